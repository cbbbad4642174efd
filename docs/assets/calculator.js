// SPDX-License-Identifier: Apache-2.0
// The memory calculator: reads the figures from the table of its page, so that they are written once.

/** Bytes of plain PyTorch and of this library for one row of the table. */
function bytes(row, n, columns, d) {
  return {
    plain: row.matrices * n * columns * 4,
    ours: row.factor * n * d * 4 + row.fixed * 2 ** 20,
  };
}

function readable(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count < 10 && unit ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

function rowsOf(table) {
  return [...table.tBodies[0].rows].map((row) => {
    const cells = [...row.cells].map((cell) => cell.textContent.trim());
    const [matrices, factor, fixed] = cells.slice(2).map(Number);
    return { name: cells[0], unit: cells[1], matrices, factor, fixed };
  });
}

function start() {
  const find = (id) => document.getElementById(id);
  const table = [...document.querySelectorAll("article table")].find((t) => t.textContent.includes("nt_xent_loss"));
  const rows = rowsOf(table);
  for (const [i, row] of rows.entries()) {
    find("loss").add(new Option(row.name, i));
  }
  const show = () => {
    const row = rows[find("loss").value];
    const queue = row.name.includes("queue");
    find("columns").parentElement.hidden = !queue;
    const [n, d] = [Number(find("rows").value), Number(find("features").value)];
    const columns = queue ? Number(find("columns").value) : n;
    if (!(n > 0 && d > 0 && columns > 0)) {
      find("answer").textContent = "All sizes must be at least 1.";
      return;
    }
    const { plain, ours } = bytes(row, n, columns, d);
    find("answer").textContent =
      `N counts ${row.unit}. Plain PyTorch: ${readable(plain)}. sslkernels: ${readable(ours)}.` +
      (n <= 4 * d && !queue ? " At this size ours may also keep the logits, at most 4 MiB." : "");
  };
  for (const id of ["loss", "rows", "columns", "features"]) {
    find(id).addEventListener("input", show);
  }
  find("sizes").hidden = false;
  show();
}

if (typeof document !== "undefined") {
  start();
}
if (typeof module !== "undefined") {
  module.exports = { bytes, readable };
}
