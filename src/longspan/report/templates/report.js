"use strict";
(() => {
  const tip = document.getElementById("tip");
  const dialog = document.getElementById("samples");
  let parsed = null, places = null, described = null;

  // The samples are read when a cell is first looked at: a page of many megabytes opens at once.
  function data() {
    parsed ??= JSON.parse(document.getElementById("sample-data").textContent);
    return parsed;
  }
  // The samples of a cell that several tables show stand once.
  function cellOf(key) {
    const found = data().cells[key];
    return typeof found === "string" ? data().cells[found] : found;
  }
  function element(name, cls, text) {
    const node = document.createElement(name);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function read([prompt, id, output, score = null, unscored = null, length = null, depth = null, seconds = null, finish = null, thoughts = null]) {
    const { texts, prompts } = data();
    const [window, question, expected] = prompts[prompt].map((n) => texts[n]);
    return { prompt, id, output: texts[output], score, unscored, length, depth, seconds, window, question, expected,
      finish: finish === null ? "" : texts[finish], thoughts: thoughts === null ? "" : texts[thoughts] };
  }
  function lower(key) { return data().maps[key.split("/")[0]].lower; }
  function verdict({ score, unscored }, key) {
    if (score === null) return ["open", "not scored: " + unscored];
    if (lower(key)) return ["open", "score " + +score.toFixed(3)];
    return score === 1 ? ["right", "correct"] : score === 0 ? ["wrong", "wrong"] : ["open", "score " + +score.toFixed(3)];
  }
  // Marks each expected answer where it stands in a text; null when none of them does.
  function marked(node, text, expected) {
    const found = expected.split("\n").filter((answer) => answer && text.includes(answer));
    let rest = text, any = false;
    while (found.length) {
      const next = found.map((answer) => [rest.indexOf(answer), answer]).filter(([at]) => at >= 0).sort((a, b) => a[0] - b[0])[0];
      if (!next) break;
      node.append(rest.slice(0, next[0]), element("mark", "", next[1]));
      rest = rest.slice(next[0] + next[1].length);
      any = true;
    }
    node.append(rest);
    return any;
  }
  function around(text, expected, chars) {
    if (text.length <= chars) return text;
    const at = Math.max(0, ...expected.split("\n").map((answer) => (answer ? text.indexOf(answer) : -1)));
    const start = Math.min(Math.max(0, at - chars / 2), text.length - chars);
    return (start ? "\u2026" : "") + text.slice(start, start + chars) + (start + chars < text.length ? "\u2026" : "");
  }

  function fillTip(mark) {
    tip.replaceChildren(element("div", "", mark.dataset.tip || mark.getAttribute("aria-label")));
    const found = mark.dataset.cell && cellOf(mark.dataset.cell);
    if (!found || !found[1].length) return;
    const sample = read(found[1][0]);
    const list = element("dl");
    const add = (name, value) => { if (value) list.append(element("dt", "", name), element("dd", "", around(value, "", 160))); };
    if (sample.window) {
      const shown = element("dd", "window");
      marked(shown, around(sample.window, sample.expected, 200), sample.expected);
      list.append(element("dt", "", "prompt"), shown);
    }
    add("question", sample.question);
    add("expected", sample.expected.replaceAll("\n", " | "));
    if (sample.thoughts) add("thoughts", sample.thoughts);
    add("answer", sample.output || "(empty)");
    add("score", verdict(sample, mark.dataset.cell)[1]);
    tip.append(list);
    if (found[0] > 1) tip.append(element("div", "more", "1 of " + found[0] + " samples; click or press Enter for all"));
  }
  function overMark(mark) {
    if (described === mark) return;
    fillTip(mark);
    tip.hidden = false;
    described = mark;
    placeTip();
  }
  function placeTip() {
    const mark = described;
    const at = mark.getBoundingClientRect(), box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - box.width / 2), innerWidth - box.width - 8);
    const above = at.top - box.height - 10;
    tip.style.left = left + "px";
    tip.style.top = (above > 8 ? above : Math.min(at.bottom + 10, Math.max(8, innerHeight - box.height - 8))) + "px";
  }
  function hideTip() { tip.hidden = true; described = null; }
  // What a cell says on hovering is said by touch too, and to screen readers.
  for (const cell of document.querySelectorAll("td[title],th[title]")) {
    cell.dataset.tip = cell.title;
    cell.setAttribute("aria-description", cell.title);
    cell.removeAttribute("title");
  }
  const MARKS = "[data-tip],[data-cell]";
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest(MARKS);
    if (mark) overMark(mark); else if (described) hideTip();
  });
  document.addEventListener("focusin", (event) => {
    const mark = event.target.closest(MARKS);
    if (mark && mark.matches(":focus-visible")) overMark(mark); else hideTip();
  });
  // A cell that the keyboard reached off screen is scrolled to: its text goes with it.
  document.addEventListener("scroll", () => { if (described && described === document.activeElement) placeTip(); else hideTip(); }, { passive: true });

  // Where else the same prompt was answered: the same task, row, column and prompt in another map.
  function others(key, prompt) {
    if (!places) {
      places = new Map();
      for (const [cell, found] of Object.entries(data().cells)) {
        for (const row of typeof found === "string" ? [] : found[1]) {
          const where = place(cell, row[0]);
          if (!where) continue;
          if (!places.has(where)) places.set(where, []);
          places.get(where).push([cell, row]);
        }
      }
    }
    return (places.get(place(key, prompt)) ?? []).filter(([cell]) => cell.split("/")[0] !== key.split("/")[0]);
  }
  function place(key, prompt) {
    const [name, row, column] = key.split("/"), map = data().maps[name];
    return map.rows.length ? [map.task, map.rows[row], map.columns[column], prompt].join("\n") : null;
  }
  function sampleItem(key, row) {
    const sample = read(row), item = element("li"), line = element("div", "verdict"), [cls, word] = verdict(sample, key);
    line.append(element("b", cls, word), element("span", "", sample.id));
    if (sample.length !== null) line.append(element("span", "", sample.length.toLocaleString("en") + " tokens"));
    if (sample.depth !== null) line.append(element("span", "", "depth " + (100 * sample.depth).toFixed(1) + "%"));
    if (sample.seconds !== null) line.append(element("span", "", +sample.seconds.toFixed(2) + " s"));
    if (sample.finish) line.append(element("span", "", sample.finish === "length" ? "cut at its longest" : sample.finish));
    const answers = element("dl", "answers");
    const add = (name, value) => answers.append(element("dt", "", name), element("dd", "", value));
    if (sample.question) add("question", sample.question);
    if (sample.expected) add("expected", sample.expected);
    if (sample.thoughts) add("thoughts", sample.thoughts);
    add("answer", sample.output || "(empty)");
    for (const [cell, other] of others(key, sample.prompt)) {
      const their = read(other);
      add(data().maps[cell.split("/")[0]].label, (their.output || "(empty)") + " (" + verdict(their, cell)[1] + ")");
    }
    item.append(line, answers);
    if (sample.window) {
      const shown = element("div", "window");
      marked(shown, sample.window, sample.expected);
      item.append(shown);
    }
    return item;
  }
  function openCell(cell) {
    const key = cell.dataset.cell, found = cellOf(key);
    if (!found) return;
    const [total, rows] = found;
    hideTip();
    document.getElementById("samples-title").textContent = cell.getAttribute("aria-label");
    const count = rows.length < total ? rows.length + " of " + total : total;
    const order = lower(key) ? ", worst first" : rows.some((row) => row[3] !== 1) ? ", wrong answers first" : "";
    document.getElementById("samples-note").textContent = count + (total === 1 ? " sample" : " samples") + order;
    document.getElementById("samples-list").replaceChildren(...rows.map((row) => sampleItem(key, row)));
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  // One tab stop per map or table; the arrow keys walk its cells and step over those without samples.
  for (const map of document.querySelectorAll(".heat,[data-grid]")) {
    const cells = [...map.querySelectorAll("[data-cell]")];
    if (!cells.length) continue;
    cells[0].setAttribute("tabindex", 0);
    const where = (cell) => cell.dataset.cell.split("/").slice(1).map(Number);
    map.addEventListener("keydown", (event) => {
      const cell = event.target.closest("[data-cell]");
      if (!cell) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); openCell(cell); return; }
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move && event.key !== "Home" && event.key !== "End") return;
      event.preventDefault();
      const [row, column] = where(cell);
      const ahead = (other) => {
        const [r, c] = where(other);
        if (!move) return r === row ? (event.key === "Home" ? c : -c) : Infinity;
        const along = (r - row) * move[0] + (c - column) * move[1];
        const aside = move[0] ? c - column : r - row;
        return along > 0 && aside === 0 ? along : Infinity;
      };
      const next = cells.reduce((best, other) => (ahead(other) < ahead(best) ? other : best), cell);
      if (next === cell) return;
      cell.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
    map.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-cell]");
      if (!cell) return;
      for (const other of cells) other.setAttribute("tabindex", other === cell ? 0 : -1);
      cell.focus();
      openCell(cell);
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
