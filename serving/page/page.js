"use strict";

const MOST_ROWS = 200;
const EVERY_MS = 2000;
const element = (id) => document.getElementById(id);
const state = { models: [], adapters: [], status: null, picked: new Set(), asking: null };

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function read(path) {
  const reply = await fetch(path, { headers: headers() });
  const data = await reply.json();
  if (reply.status === 401) element("key-label").hidden = false;
  if (!reply.ok) throw new Error(data.error.message);
  return data;
}

function tell(problem) {
  element("problem").textContent = problem;
  element("problem").hidden = !problem;
}

async function refresh() {
  try {
    const [models, status, adapters] = await Promise.all([
      read("/v1/models"), read("/v1/status"), read("/v1/lora_adapters"),
    ]);
    showStatus(status);
    showModels(models.data);
    state.adapters = adapters.data;
    showAdapters();
    tell("");
  } catch (error) {
    tell(error.message === "Failed to fetch" ? "The server does not answer." : error.message);
  }
}

function showStatus(status) {
  const first = state.status === null;
  state.status = status;
  const now = status.now;
  element("base").textContent = status.base;
  const load = `${now.answers_running} of ${now.slots} slots busy, ${status.in_flight} answers in the making`;
  const inMemory = now.adapters_in_memory === undefined ? "" : `${now.adapters_in_memory} of `;  // else on replicas
  const held = `${inMemory}${now.adapters} adapters${inMemory && " in memory"}`;
  element("load").textContent = `${load}; ${held}${status.is_draining ? "; shutting down" : ""}`;
  element("newline-label").hidden = status.has_chat_template;
  if (first) element("newline").checked = !status.has_chat_template;
}

function showModels(models) {
  const names = models.filter((model) => model.kind !== "mixture" || !model.tasks.length).map((model) => model.id);
  if (names.join("\n") === state.models.join("\n")) return;
  if (!state.models.length) names.slice(0, 4).forEach((name) => state.picked.add(name));
  state.models = names;
  element("models").replaceChildren(...names.map((name) => {
    const box = Object.assign(document.createElement("input"), {
      type: "checkbox", value: name, checked: state.picked.has(name),
    });
    box.addEventListener("change", () => state.picked[box.checked ? "add" : "delete"](name));
    const label = document.createElement("label");
    label.append(box, ` ${name}`);
    return label;
  }));
}

function showAdapters() {
  const traffic = state.status.traffic;
  const wanted = element("filter").value.toLowerCase();
  const base = { name: "base", generation: null, rank: 0, state: "", leases: "", pinned: false };
  const found = [base, ...state.adapters].filter((adapter) => adapter.name.toLowerCase().includes(wanted));
  const choices = Object.values(traffic).reduce((sum, row) => sum + (row.choices || 0), 0);
  element("adapters").replaceChildren(...found.slice(0, MOST_ROWS).map((adapter) => {
    const row = traffic[adapter.name] || {};
    const generation = adapter.generation ? adapter.generation.slice(0, 10) : "";
    const where = adapter.state + (adapter.pinned ? ", pinned" : "");
    return tableRow([
      adapter.name, generation, adapter.rank || "", where, adapter.leases, row.answers || 0, row.tokens || 0,
      share(row.choices || 0, choices),
    ]);
  }));
  const left = found.length - MOST_ROWS;
  element("more").textContent = left > 0 ? `and ${left} more: narrow them down` : "";
}

function tableRow(cells) {
  const row = document.createElement("tr");
  for (const cell of cells) row.insertCell().append(cell);
  return row;
}

function share(count, total) {
  const cell = document.createElement("span");
  const bar = Object.assign(document.createElement("meter"), { min: 0, max: total || 1, value: count });
  bar.setAttribute("aria-label", `${count} of ${total}`);
  cell.append(bar, ` ${count}`);
  return cell;
}

async function ask(event) {
  event.preventDefault();
  if (!state.picked.size) return tell("Pick who answers.");
  state.asking = new AbortController();
  element("send").disabled = true;
  element("stop").disabled = false;
  element("answers").replaceChildren();
  await Promise.all(state.models.filter((name) => state.picked.has(name)).map(answer));
  element("send").disabled = false;
  element("stop").disabled = true;
  refresh();
}

async function answer(model) {
  const card = document.createElement("article");
  card.className = "answer";
  const title = Object.assign(document.createElement("h3"), { textContent: model });
  const text = document.createElement("pre");
  const note = document.createElement("p");
  card.append(title, text, note);
  element("answers").append(card);
  const began = performance.now();
  try {
    const told = await stream(model, text);
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    if (model === "auto") title.textContent = `${model}: ${told.adapter} (${Math.round(100 * told.adapter_weight)} %)`;
    note.textContent = `${told.usage.completion_tokens} tokens, ${seconds} s, ${told.finish_reason}`;
  } catch (error) {
    card.classList.add("failed");
    note.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
}

function request(model) {
  const prompt = element("prompt").value;
  const settings = {
    model, max_tokens: Number(element("tokens").value), temperature: Number(element("temperature").value),
    stream: true, stream_options: { include_usage: true },
  };
  if (state.status.has_chat_template)
    return ["/v1/chat/completions", { ...settings, messages: [{ role: "user", content: prompt }] }];
  return ["/v1/completions", { ...settings, prompt: element("newline").checked ? `${prompt}\n` : prompt }];
}

async function stream(model, text) {
  const [path, body] = request(model);
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal: state.asking.signal };
  const reply = await fetch(path, options);
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const told = {};
  let rest = "";
  for await (const part of reply.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + part).split("\n\n");
    rest = lines.pop();
    for (const line of lines) take(line, text, told);
  }
  return told;
}

function take(line, text, told) {
  if (!line.startsWith("data: {")) return;
  const data = JSON.parse(line.slice("data: ".length));
  if (data.error) throw new Error(data.error.message);
  if (data.usage) told.usage = data.usage;
  for (const choice of data.choices) {
    text.append(choice.text ?? choice.delta.content ?? "");
    told.adapter = choice.adapter;
    told.adapter_weight = choice.adapter_weight;
    told.finish_reason = choice.finish_reason ?? told.finish_reason;
  }
}

element("ask").addEventListener("submit", ask);
element("stop").addEventListener("click", () => state.asking.abort());
element("key").addEventListener("change", refresh);
element("filter").addEventListener("input", () => state.status && showAdapters());
refresh();
setInterval(() => document.hidden || refresh(), EVERY_MS);
