// The catalogue: one page over the hub's own API. Everything a repo says is put in as text; only its card is HTML, which
// the hub has sanitised.

const root = new URL("..", import.meta.url);
const at = (path) => new URL(path.replace(/^\//, ""), root);
const byId = (id) => document.getElementById(id);
const PAGE = 50;
const filters = { base: "base_model:adapter:", task: "task:", method: "loramux:" };
let marked = null;
let nextPage = null;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function ask(address) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(address, token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  if (!answer.ok) throw new Error(answer.headers.get("X-Error-Message") || `the hub answered ${answer.status}`);
  return answer;
}

// The list

function query() {
  const search = new URLSearchParams({ limit: PAGE, sort: byId("sort").value });
  if (byId("words").value.trim()) search.set("words", byId("words").value.trim());
  for (const [name, prefix] of Object.entries(filters)) {
    if (byId(name).value) search.append("filter", prefix + byId(name).value);
  }
  return search;
}

let asked = 0;
async function list(address = at(`api/models?${query()}`), append = false) {
  const number = ++asked;
  try {
    const answer = await ask(address);
    const repos = await answer.json();
    if (number !== asked) return; // a later search is on its way
    nextPage = answer.headers.get("Link")?.match(/<([^>]+)>; rel="next"/)?.[1] ?? null;
    byId("results").replaceChildren(...(append ? byId("results").children : []), ...repos.map(row));
    byId("more").hidden = !nextPage;
    const shown = byId("results").children.length;
    byId("count").textContent = shown ? `${shown}${nextPage ? " and more" : ""} shown` : "Nothing matches.";
    showCurrent();
  } catch (error) {
    byId("count").textContent = error.message;
  }
}

function row(repo) {
  const facts = [...namesOf(repo.tags, "loramux:"), ...namesOf(repo.tags, "task:").slice(0, 6)].join(" · ");
  const downloads = repo.downloads ? ` · ${repo.downloads} downloads` : "";
  const link = make("a", { href: at(repo.id), "data-page": "", "data-repo": repo.id }, make("b", {}, repo.id));
  link.append(make("small", {}, `${repo.private ? "private · " : ""}${repo.lastModified.slice(0, 10)}${downloads}`));
  link.append(make("small", {}, facts || (repo.library_name ?? "")));
  if (repo.id === marked) link.dataset.marked = "";
  return make("li", {}, link);
}

const namesOf = (tags, prefix) => tags.filter((tag) => tag.startsWith(prefix)).map((tag) => tag.slice(prefix.length));

async function fillFilters() {
  const facets = await (await ask(at("_page/facets"))).json();
  for (const name of Object.keys(filters)) {
    const options = Object.entries(facets[name]).map(([value, count]) => make("option", { value }, `${value} (${count})`));
    byId(name).replaceChildren(make("option", { value: "" }, `any ${name}`), ...options);
  }
}

// One adapter. Pages are made whole, as a title and what goes below it, and shown if nobody has gone elsewhere meanwhile.

async function show(repo, type) {
  const told = await (await ask(at(`_page/${type}/${repo}`))).json();
  const parts = [
    make("h1", {}, repo),
    make("p", { class: "tags" }, ...told.tags.slice(0, 40).map((tag) => make("span", {}, tag))),
    use(repo, type, told.base, told.folder),
  ];
  if (told.results.length) parts.push(make("h2", {}, "Results"), chart([{ name: repo, results: told.results }]));
  const card = make("div", { class: "card" });
  card.innerHTML = told.card;
  showPrivateImages(card);
  parts.push(card, make("h2", {}, "Files"), files(type === "models" ? repo : `${type}/${repo}`, told.files));
  return [repo, parts];
}

// What repos say about themselves is quoted: these lines are pasted and run.
// `folder` is where the adapter lies in the repo, "" at its root, null where there is none.
function use(repo, type, base, folder) {
  const inside = folder ? `, subfolder=${JSON.stringify(folder)}` : "";
  const lines = folder !== null
    ? [
        `# export HF_ENDPOINT=${root.href.replace(/\/$/, "")}`,
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        `base = AutoModelForCausalLM.from_pretrained(${JSON.stringify(base ?? "BASE")})`,
        `model = PeftModel.from_pretrained(base, "${repo}"${inside})`,
      ]
    : [`HF_ENDPOINT=${root.href.replace(/\/$/, "")} hf download ${type === "models" ? "" : `--repo-type ${type.slice(0, -1)} `}${repo}`];
  const button = make("button", { type: "button", id: "copy" }, "Copy");
  button.addEventListener("click", () => copy(lines.join("\n"), button));
  return make("div", { class: "use" }, make("pre", {}, lines.join("\n")), button);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(button.previousElementSibling); // not allowed: leave it selected
    button.textContent = "Selected";
  }
}

async function showPrivateImages(card) {
  if (!sessionStorage.getItem("token")) return;
  for (const image of card.querySelectorAll("img")) {
    const answer = await ask(image.src).catch(() => null);
    if (answer) image.src = URL.createObjectURL(await answer.blob());
  }
}

function files(place, listed) {
  const rows = listed.map((file) => {
    const link = make("a", { href: at(`${place}/resolve/main/${file.path.split("/").map(encodeURIComponent).join("/")}`) });
    link.append(file.path);
    return make("tr", {}, make("td", {}, link), make("td", {}, size(file.size)));
  });
  return make("table", {}, ...rows);
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = bytes ? Math.min(Math.floor(Math.log2(bytes) / 10), 4) : 0;
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

// Results as bars: a group for each task, in it a bar for each way of scoring (of each adapter) that it has. Tasks have
// metrics of their own, so of a metric such as "accuracy (exported)" the part in brackets is what bars have in common.

const wayOf = (metric) => metric.match(/\(([^()]+)\)$/)?.[1] ?? metric;

function chart(adapters) {
  const bars = adapters.flatMap(({ name, results }) =>
    results.map((result) => ({ ...result, way: (adapters.length > 1 ? `${name}: ` : "") + wayOf(result.metric) })),
  );
  const ways = [...new Set(bars.map((bar) => bar.way))];
  const most = Math.max(1, ...bars.map((bar) => bar.value));
  const [left, width, thick, gap] = [150, 720, 14, 10];
  const svg = draw("svg", { role: "img", "aria-label": "Results" });
  ways.forEach((way, index) => {
    svg.append(draw("rect", { x: left, y: 18 * index + 3, width: 12, height: 12, class: `bar-${index % 6}` }));
    svg.append(draw("text", { x: left + 18, y: 18 * index + 13 }, way));
  });
  const start = 18 * ways.length + 10;
  let y = start;
  for (const task of new Set(bars.map((bar) => bar.task))) {
    const group = bars.filter((bar) => bar.task === task);
    const middle = y + (group.length * thick) / 2 + 3;
    svg.append(draw("text", { x: left - 8, y: middle, "text-anchor": "end" }, task.slice(0, 22)));
    for (const bar of group) {
      const length = (Math.max(0, bar.value) / most) * (width - left - 60);
      const colour = `bar-${ways.indexOf(bar.way) % 6}`;
      const rect = draw("rect", { x: left, y, width: Math.max(length, 1), height: thick - 2, class: colour });
      rect.append(draw("title", {}, `${task}, ${bar.metric}: ${bar.value}`));
      svg.append(rect, draw("text", { x: left + length + 5, y: y + thick - 4 }, Number(bar.value.toPrecision(4)).toString()));
      y += thick;
    }
    y += gap;
  }
  svg.append(draw("line", { x1: left, x2: left, y1: start - 4, y2: y, class: "axis" }));
  svg.setAttribute("viewBox", `0 0 ${width} ${y + 5}`);
  return svg;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.append(text);
  return element;
}

// Two adapters

async function compare(one, two) {
  const told = await Promise.all([one, two].map(async (repo) => (await ask(at(`_page/models/${repo}`))).json()));
  const facts = {
    base: (repo) => repo.base ?? "",
    method: (repo) => namesOf(repo.tags, "loramux:").join(", "),
    rank: (repo) => String(repo.rank ?? ""),
    tasks: (repo) => namesOf(repo.tags, "task:").join(", "),
    licence: (repo) => namesOf(repo.tags, "license:").join(", "),
    size: (repo) => size(repo.size),
    changed: (repo) => repo.lastModified.slice(0, 10),
    downloads: (repo) => String(repo.downloads),
  };
  const head = make("tr", {}, make("th"), ...[one, two].map((repo) => make("th", {}, link(repo))));
  const rows = Object.entries(facts).map(([name, fact]) =>
    make("tr", {}, make("th", {}, name), ...told.map((repo) => make("td", {}, fact(repo)))),
  );
  const parts = [make("h1", {}, "Compared"), make("table", {}, head, ...rows)];
  const measured = told.map((repo, index) => ({ name: [one, two][index], results: repo.results }));
  if (told.some((repo) => repo.results.length)) parts.push(make("h2", {}, "Results"), chart(measured));
  return [`${one} and ${two}`, parts];
}

const link = (repo) => make("a", { href: at(repo), "data-page": "" }, repo);

function mark(repo) {
  if (marked && marked !== repo) {
    const [one, two] = [marked, repo];
    marked = null;
    go(at(`_compare?${new URLSearchParams({ one, two })}`));
  } else {
    marked = marked ? null : repo;
  }
  for (const row of byId("results").querySelectorAll("a")) row.toggleAttribute("data-marked", row.dataset.repo === marked);
}

// Where we are

const path = () => location.pathname.slice(root.pathname.length);

let routed = 0;
async function route() {
  const number = ++routed;
  const page = await find().catch((error) => ["Adapters", [make("p", { class: "trouble" }, error.message)]]);
  if (number !== routed) return; // a later page is on its way
  document.title = page[0];
  byId("detail").replaceChildren(...page[1]);
  showCurrent();
}

async function find() {
  const here = new URLSearchParams(location.search);
  const parts = path().split("/").map(decodeURIComponent);
  const type = ["datasets", "spaces"].includes(parts[0]) ? parts.shift() : "models";
  if (path() === "_compare") return compare(here.get("one"), here.get("two"));
  return path() ? show(parts.slice(0, 2).join("/"), type) : welcome();
}

function welcome() {
  const endpoint = `export HF_ENDPOINT=${root.href.replace(/\/$/, "")}`;
  const parts = [
    make("h1", {}, "Adapters on this hub"),
    make("p", {}, "Choose one, or mark two with c to compare them. Every Hugging Face client works with this hub:"),
    make("pre", {}, `${endpoint}\nhf download OWNER/NAME\nloramux publish RUN OWNER/NAME`),
  ];
  return ["Adapters", parts];
}

function showCurrent() {
  for (const row of byId("results").querySelectorAll("a")) {
    if (row.dataset.repo === decodeURIComponent(path())) row.setAttribute("aria-current", "page");
    else row.removeAttribute("aria-current");
  }
}

function go(address) {
  history.pushState(null, "", address);
  route();
}

// Hands

function step(by) {
  const rows = [...byId("results").querySelectorAll("a")];
  const index = rows.indexOf(document.activeElement);
  rows[Math.max(0, Math.min(rows.length - 1, index + by))]?.focus();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || byId("token-dialog").open) return;
  if (event.key === "/" && !typing) byId("words").focus();
  else if (event.key === "ArrowDown" && !event.target.matches("select")) step(1);
  else if (event.key === "ArrowUp" && !event.target.matches("select")) step(-1);
  else if (event.key === "Enter" && event.target === byId("words")) byId("results").querySelector("a")?.click();
  else if (event.key === "Escape") typing ? event.target.blur() : go(root);
  else if (event.key === "c" && event.target.dataset.repo) mark(event.target.dataset.repo);
  else return;
  event.preventDefault();
});

document.addEventListener("click", (event) => {
  const page = event.target.closest?.("a[data-page]");
  if (!page || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(page.href);
});

let typed;
byId("words").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(list, 120);
});
for (const id of [...Object.keys(filters), "sort"]) byId(id).addEventListener("change", () => list());
byId("more").addEventListener("click", () => nextPage && list(nextPage, true));
byId("login").addEventListener("click", () => byId("token-dialog").showModal());
byId("token-dialog").addEventListener("close", () => {
  if (byId("token-dialog").returnValue === "use") sessionStorage.setItem("token", byId("token").value);
  else if (byId("token-dialog").returnValue === "forget") sessionStorage.removeItem("token");
  byId("token").value = "";
  start();
});
addEventListener("popstate", route);

function start() {
  fillFilters().catch(() => {});
  list();
  route();
}

start();
