"use strict";
// The table of every utterance: unpacks the page's own data, filters and sorts it, and builds the rows of one page of it.
// Texts only ever become text nodes.
(async () => {
  const PAGE = 25;
  const [KEY, SET, SPEAKER, SECONDS, REFERENCE, FIELDS, EDITS] = [0, 1, 2, 3, 4, 5, 6]; // columns of a row; then the other systems' edits
  const get = (id) => document.getElementById(id);
  const settings = JSON.parse(get("settings").textContent);
  const pause = () => new Promise((done) => setTimeout(done));
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (typeof value === "boolean") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  async function unpack() {
    await pause(); // the page is painted first
    const bytes = atob(get("packed").textContent);
    const array = new Uint8Array(bytes.length);
    for (let index = 0; index < bytes.length; index++) array[index] = bytes.charCodeAt(index);
    const stream = new Blob([array]).stream().pipeThrough(new DecompressionStream("gzip"));
    const lines = (await new Response(stream).text()).split("\n");
    const head = JSON.parse(lines[0]);
    const rows = [];
    for (let start = 1; start < lines.length; start += 5000) { // in pieces, so that the page answers meanwhile
      rows.push(...JSON.parse(`[${lines.slice(start, start + 5000).filter(Boolean).join(",")}]`));
      await pause();
    }
    return [head, rows];
  }

  // paper has nothing to click: what is folded prints open
  const folded = [];
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details:not([open])")) { one.open = true; folded.push(one); } });
  addEventListener("afterprint", () => { for (const one of folded.splice(0)) one.open = false; });

  const browser = get("browser");
  browser.hidden = false;
  get("status").textContent = "Unpacking…";
  let head, rows;
  try {
    [head, rows] = await unpack();
  } catch (error) {
    get("status").textContent = `This browser cannot unpack the table (${error.message}); utterances.jsonl has all of it.`;
    return;
  }

  const systems = head.systems.map((name, index) => ({ name, index, ...settings.systems[name] }));
  const errors = (row, system) => row[EDITS + system.index]?.length ?? 0;
  const words = (row) => (row[REFERENCE] ? row[REFERENCE].split(" ").length : 0);
  const find = (name) => systems.find((system) => system.name === name);
  const [baseline, student] = [find(settings.baseline), find(settings.student)];
  const pair = baseline && student && baseline !== student ? [student, baseline] : null;

  const columns = [
    { title: "Utterance", of: (row) => row[KEY], text: true },
    { title: "Seconds", of: (row) => row[SECONDS], digits: 1 },
    { title: "Words", of: words },
    ...systems.map((system) => ({ title: system.name, of: (row) => errors(row, system), system })),
  ];
  if (pair) columns.push({ title: "Change", hint: `errors of ${student.name} − of ${baseline.name}`, of: (row) => errors(row, pair[0]) - errors(row, pair[1]) });

  const filters = [["all", () => true], ["with any error", (row) => systems.some((system) => errors(row, system))]];
  for (const system of systems) filters.push([`with errors of ${system.name}`, (row) => errors(row, system)]);
  if (pair) {
    filters.push([`${student.name} better than ${baseline.name}`, (row) => errors(row, pair[0]) < errors(row, pair[1])]);
    filters.push([`${student.name} worse than ${baseline.name}`, (row) => errors(row, pair[0]) > errors(row, pair[1])]);
  }

  const start = columns.findIndex((column) => column.system && column.system === (student ?? systems[0]));
  const state = { sort: start, down: true, page: 0, terms: [], filter: 0, field: null, value: null };
  let found = [];
  const haystacks = new Array(rows.length);

  function haystack(index) {
    const row = rows[index];
    return (haystacks[index] ??= [
      row[KEY], row[SET], row[SPEAKER], ...row[FIELDS], row[REFERENCE], ...systems.flatMap((system) => (row[EDITS + system.index] ?? []).map((edit) => edit[1])),
    ].filter((item) => item !== null && item !== undefined).join(" ").toLowerCase());
  }

  function valueOf(row, field) {
    if (field === "set") return row[SET];
    return field === "speaker" ? row[SPEAKER] : row[FIELDS][head.fields.indexOf(field)];
  }

  function update() {
    const keep = filters[state.filter][1];
    found = [];
    rows.forEach((row, index) => {
      if (!keep(row) || (state.field !== null && valueOf(row, state.field) !== state.value)) return;
      if (state.terms.every((term) => haystack(index).includes(term))) found.push(index);
    });
    const { of, text } = columns[state.sort];
    const values = rows.map(of);
    const way = state.down ? -1 : 1;
    found.sort((a, b) => (text ? way * values[a].localeCompare(values[b], "en", { numeric: true }) : way * (values[a] - values[b])) || a - b);
    state.page = 0;
    draw();
  }

  function sortBy(index) {
    state.down = state.sort === index ? !state.down : !columns[index].text;
    state.sort = index;
    update();
  }

  function heads() {
    return make("tr", {}, ...columns.map((column, index) => {
      const sorted = state.sort === index;
      const button = make("button", { type: "button", onclick: () => { sortBy(index); get("rows").tHead.querySelectorAll("button")[index].focus(); } });
      if (column.system) button.append(make("span", { class: `dot ${column.system.series}` }));
      button.append(column.title, make("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (state.down ? "▼" : "▲") : "↕"));
      if (column.hint || column.system) button.title = column.hint ?? `word errors of ${column.title}`;
      return make("th", { scope: "col", "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" }, button);
    }));
  }

  const unseen = (text) => make("span", { class: "unseen" }, text);
  const letter = (text) => make("i", { "aria-hidden": "true" }, text);
  const shapes = {
    substitution: (said, heard) => [unseen("substitution: "), make("span", { class: "r" }, said), unseen(" recognised as "), make("span", { class: "h" }, heard), letter("S")],
    deletion: (said) => [unseen("deletion: "), make("del", {}, said), letter("D")],
    insertion: (said, heard) => [unseen("insertion: "), make("ins", {}, heard), letter("I")],
  };

  function aligned(reference, edits) {
    const line = make("p", { class: "aligned" });
    const put = (kind, said, heard) => line.append(kind ? make("span", { class: `edit ${kind}` }, ...shapes[kind](said, heard)) : make("span", {}, said), " ");
    const said = reference ? reference.split(" ") : [];
    let next = 0;
    for (let index = 0; index <= said.length; index++) {
      let whole = true;
      for (; next < edits.length && edits[next][0] === index; next++) {
        const [, heard, inserted] = edits[next];
        put(inserted ? "insertion" : heard === undefined ? "deletion" : "substitution", said[index], heard);
        whole = whole && Boolean(inserted);
      }
      if (whole && index < said.length) put(null, said[index]);
    }
    return line;
  }

  function body(row) {
    const known = [
      settings.sets > 1 && row[SET], row[SPEAKER] !== null && `speaker ${row[SPEAKER]}`,
      ...head.fields.map((field, index) => row[FIELDS][index] !== null && `${field} ${row[FIELDS][index]}`),
    ].filter(Boolean).join(", ");
    const figures = make("tr", {}, make("th", { scope: "row" }, row[KEY], make("small", {}, known)), ...columns.slice(1).map((column) => {
      const value = column.of(row);
      return make("td", {}, (column.hint && value > 0 ? "+" : "") + value.toFixed(column.digits ?? 0).replace("-", "−"));
    }));
    const who = (system) => make("span", { class: "who" }, make("span", { class: `dot ${system.series}` }), system.name, " ", make("small", {}, count(errors(row, system), "error")));
    const lines = systems.filter((system) => system.shown).map((system) => {
      const edits = row[EDITS + system.index];
      const text = edits === null ? make("p", { class: "aligned" }, "(not scored)") : aligned(row[REFERENCE], edits);
      return make("div", { class: "line" }, who(system), text);
    });
    const reference = make("div", { class: "line" }, make("span", { class: "who" }, "reference"), make("p", { class: "aligned" }, row[REFERENCE] || "(nothing was said)"));
    const texts = make("tr", {}, make("td", { colspan: `${columns.length}`, class: "texts" }, make("div", {}, reference, ...lines)));
    return make("tbody", {}, figures, texts);
  }

  function draw() {
    const table = get("rows");
    table.tHead.replaceChildren(heads());
    for (const old of [...table.tBodies]) old.remove();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    const first = state.page * PAGE;
    const shown = found.slice(first, first + PAGE);
    table.append(...shown.map((index) => body(rows[index])));
    const range = shown.length ? `, ${(first + 1).toLocaleString("en")} to ${(first + shown.length).toLocaleString("en")} shown` : "";
    get("status").textContent = `${found.length.toLocaleString("en")} of ${count(rows.length, "utterance")}${range}.`;
    const turn = (title, page) => make("button", { type: "button", disabled: page < 0 || page >= pages || page === state.page, onclick: () => {
      state.page = page;
      draw();
      get("status").scrollIntoView({ block: "nearest" });
      table.parentElement.focus({ preventScroll: true });
    } }, title);
    document.querySelector(".pages").replaceChildren(
      turn("First", 0), turn("Previous", state.page - 1), make("span", {}, `page ${(state.page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`),
      turn("Next", state.page + 1), turn("Last", pages - 1),
    );
    const chosen = get("chosen");
    chosen.hidden = state.field === null;
    chosen.replaceChildren(`Only ${state.field}: ${state.value ?? "(not given)"} `, make("button", { type: "button", onclick: () => choose(null, null) }, "show all"));
  }

  function choose(field, value) {
    Object.assign(state, { field, value });
    update();
    get("utterances").scrollIntoView();
    get("search").focus({ preventScroll: true });
  }

  let waiting;
  get("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.terms = event.target.value.toLowerCase().split(/\s+/).filter(Boolean); update(); }, 150);
  });
  get("show").append(...filters.map(([title], index) => make("option", { value: `${index}` }, title)));
  get("show").addEventListener("change", (event) => { state.filter = Number(event.target.value); update(); });
  for (const system of systems) {
    const box = make("input", { type: "checkbox", checked: system.shown, onchange: () => { system.shown = box.checked; draw(); } });
    get("shown").append(make("label", {}, box, make("span", { class: `dot ${system.series}` }), system.name));
  }
  for (const button of document.querySelectorAll("button.find")) {
    button.hidden = false;
    button.addEventListener("click", () => choose(button.dataset.field, JSON.parse(button.dataset.value)));
  }
  browser.closest("section").querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  update();
  document.documentElement.dataset.ready = "yes";
})();
