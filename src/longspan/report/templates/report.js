"use strict";
(() => {
  const tip = document.getElementById("tip");
  const dialog = document.getElementById("samples");
  const data = JSON.parse(document.getElementById("sample-data").textContent);
  let described = null;

  function showTip(mark, x, y) {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x - box.width / 2), innerWidth - box.width - 8);
    const above = y - box.height - 12;
    tip.style.left = left + "px";
    tip.style.top = (above > 8 ? above : y + 18) + "px";
    described = mark;
  }
  function hideTip() { tip.hidden = true; described = null; }
  function overMark(mark) {
    const box = mark.getBoundingClientRect();
    showTip(mark, box.left + box.width / 2, box.top);
  }

  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark) overMark(mark); else if (described) hideTip();
  });
  document.addEventListener("focusin", (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark && mark.matches(":focus-visible")) overMark(mark); else hideTip();
  });
  document.addEventListener("scroll", hideTip, { passive: true });

  function element(name, cls, text) {
    const node = document.createElement(name);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function windowOf(text, expected) {
    const node = element("div", "window");
    const place = expected ? text.indexOf(expected) : -1;
    if (place < 0) { node.textContent = text; return node; }
    node.append(text.slice(0, place), element("mark", "", expected), text.slice(place + expected.length));
    return node;
  }
  function sampleItem([prompt, id, output, score, unscored, length, depth]) {
    const [text, question, expected] = data.prompts[prompt];
    const item = element("li");
    const verdict = element("div", "verdict");
    const word = score === null ? "not scored: " + unscored : score === 1 ? "correct" : score === 0 ? "wrong" : "score " + score;
    verdict.append(element("b", score === null ? "open" : score === 1 ? "right" : "wrong", word), element("span", "", id));
    if (length !== null) verdict.append(element("span", "", length.toLocaleString("en") + " tokens"));
    if (depth !== null) verdict.append(element("span", "", "depth " + (100 * depth).toFixed(1) + "%"));
    const answers = element("dl", "answers");
    for (const [name, value] of [["question", question], ["expected", expected], ["output", output]]) {
      if (value || name === "output") answers.append(element("dt", "", name), element("dd", "", value || "(empty)"));
    }
    item.append(verdict, answers);
    if (text) item.append(windowOf(text, expected));
    return item;
  }
  function openCell(cell) {
    const found = data.cells[cell.dataset.cell];
    if (!found) return;
    hideTip();
    document.getElementById("samples-title").textContent = cell.dataset.tip;
    const count = found.rows.length < found.total ? found.rows.length + " of " + found.total : found.total;
    const order = found.rows.some((row) => row[3] !== 1) ? " samples, wrong answers first" : " samples";
    document.getElementById("samples-note").textContent = count + order;
    document.getElementById("samples-list").replaceChildren(...found.rows.map(sampleItem));
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  // One tab stop per map; the arrow keys walk its cells.
  for (const map of document.querySelectorAll(".heat")) {
    const cells = [...map.querySelectorAll("[data-cell]")];
    cells.forEach((cell, n) => cell.setAttribute("tabindex", n ? -1 : 0));
    const at = new Map(cells.map((cell) => [cell.dataset.cell, cell]));
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("[data-cell]");
      if (!cell) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openCell(cell); return; }
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      const [key, row, column] = cell.dataset.cell.split("/");
      const next = at.get([key, +row + move[0], +column + move[1]].join("/"));
      if (!next) return;
      cell.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
    map.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-cell]");
      if (cell) openCell(cell);
    });
  }
  document.getElementById("samples-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  // Paper has no click: the recipe and the environment are printed open.
  addEventListener("beforeprint", () => {
    hideTip();
    for (const block of document.querySelectorAll("details.block")) block.open = true;
  });
})();
