// The playground: two models answer the same question side by side. Everything comes from the endpoint itself.
const LOOK_EVERY_MS = 1000;
const KEY = "ftray-key"; // kept for this tab only
const $ = (id) => document.getElementById(id);

let status = null;
let asking = null; // AbortController of the answers that are being written

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element[name] = value;
  element.append(...children);
  return element;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (response.status === 401) $("key-form").hidden = false;
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? `status ${response.status}`);
  return body;
}

// ---- what the endpoint is doing --------------------------------------------------------------------------------

async function look() {
  try {
    const names = sides.map((side) => `name=${encodeURIComponent(side.model.value)}`).join("&");
    const found = await get(`ftray/status?${names}`);
    if (found.journal !== status?.journal) showNames((await get("v1/models")).data.map((model) => model.id));
    show(found);
    $("pulse").textContent = "";
  } catch (error) {
    $("pulse").textContent = error.message;
  }
}

function show(found) {
  const before = status;
  status = found;
  $("base").textContent = found.base_model;
  showAliases(found.aliases, before?.aliases);
  $("replicas").replaceChildren(...found.replicas.map(replicaView));
  showTraffic(found.traffic);
  for (const side of sides) side.showVersion();
}

function showNames(names) {
  $("models").replaceChildren(...names.map((value) => make("option", { value })));
  for (const side of sides) side.choose(names);
}

function showAliases(aliases, before) {
  const rows = Object.entries(aliases).map(([alias, to]) => {
    const canary = to.canary ? ` · canary ${to.canary.version} ${to.canary.percent}%` : "";
    const flipped = before && before[alias] && before[alias].version !== to.version;
    const old = document.querySelector(`[data-alias="${CSS.escape(alias)}"]`);
    if (old && !flipped && old.dataset.told === to.version + canary) return old; // its animation goes on
    const row = make("tr", { className: flipped ? "flipped" : "" }, make("td", {}, alias), make("td", {}, to.version + canary));
    row.dataset.alias = alias;
    row.dataset.told = to.version + canary;
    return row;
  });
  $("aliases").replaceChildren(rows.length ? make("table", {}, ...rows) : "none");
}

function replicaView(replica) {
  const chips = replica.adapters.map(({ name, tier }) => make("span", { className: `chip ${tier}`, title: `in ${tier} memory` }, name));
  const used = replica.kv_tokens_total ? replica.kv_tokens_used / replica.kv_tokens_total : 0;
  const fill = make("i");
  fill.style.width = `${Math.round(100 * used)}%`;
  return make("div", { className: "replica" },
    make("div", {}, `${replica.id}: ${replica.running} running, ${replica.waiting} waiting`),
    make("div", { className: "bar", title: "KV cache in use" }, fill),
    make("div", {}, `KV cache ${replica.kv_tokens_used.toLocaleString()} of ${replica.kv_tokens_total.toLocaleString()} tokens`),
    make("div", {}, `${replica.num_adapters} ${replica.num_adapters === 1 ? "adapter" : "adapters"}, ${bytes(replica.adapter_bytes)} of ${bytes(replica.adapter_budget)}`),
    make("div", {}, ...chips),
  );
}

function showTraffic(traffic) {
  if (!traffic.length) return $("traffic").replaceChildren("none");
  const number = (text) => make("td", { className: "number" }, text);
  const head = make("tr", {}, make("th", {}, "model"), ...["answers", "tokens", "first"].map((t) => make("th", { className: "number" }, t)));
  $("traffic").replaceChildren(make("table", {}, head, ...traffic.map((t) => make("tr", {},
    make("td", {}, t.model),
    number(t.requests.toLocaleString()),
    number(t.completion_tokens.toLocaleString()),
    number(t.first_token_s === null ? "" : milliseconds(t.first_token_s * 1000)),
  ))));
}

function bytes(number) {
  const step = Math.min(3, Math.floor(Math.log2(Math.max(number, 1)) / 10));
  return `${(number / 1024 ** step).toFixed(step ? 1 : 0)} ${["bytes", "KiB", "MiB", "GiB"][step]}`;
}

const milliseconds = (ms) => (ms >= 10_000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms)} ms`);

// ---- the two conversations -------------------------------------------------------------------------------------

class Side {
  constructor(number) {
    const view = $("side").content.cloneNode(true).firstElementChild;
    $("sides").append(view);
    this.number = number;
    this.model = view.querySelector(".model");
    this.model.setAttribute("aria-label", `Model ${number + 1}`);
    this.version = view.querySelector(".version");
    this.talk = view.querySelector(".talk");
    this.card = view.querySelector(".card");
    this.toggle = view.querySelector(".card-toggle");
    this.messages = [];
    this.model.addEventListener("change", () => { look(); this.showCard(); });
    this.model.addEventListener("focus", () => this.model.select());
    this.toggle.addEventListener("click", () => {
      this.card.hidden = !this.card.hidden;
      this.toggle.setAttribute("aria-expanded", String(!this.card.hidden));
      this.showCard();
    });
  }

  // The base on the left, the first adapter on the right, until somebody chooses.
  choose(names) {
    if (!this.model.value) this.model.value = names[Math.min(this.number, names.length - 1)] ?? "";
  }

  showVersion() {
    const name = this.model.value;
    const found = status?.versions[name] ?? "";
    const version = found === name ? "" : found; // the base, or an exact version: it says so itself
    if (version === this.version.textContent) return;
    const flipped = this.version.textContent !== "" && version !== "" && this.shownFor === name;
    this.version.textContent = version;
    this.shownFor = name;
    this.version.classList.remove("flipped");
    if (flipped) {
      void this.version.offsetWidth; // so that the animation begins again
      this.version.classList.add("flipped");
      this.showCard();
    }
  }

  async showCard() {
    if (this.card.hidden) return;
    try {
      const { card } = await get(`ftray/card?model=${encodeURIComponent(this.model.value)}`);
      this.card.replaceChildren(...markdown(card));
    } catch (error) {
      this.card.replaceChildren(error.message);
    }
  }

  clear() {
    this.messages = [];
    this.talk.replaceChildren();
  }

  async ask(question, settings, signal) {
    this.talk.append(make("div", { className: "turn user" }, question));
    const words = make("span", { className: "words" });
    const told = make("span", { className: "told" });
    const turn = make("div", { className: "turn assistant writing" }, words, told);
    this.talk.append(turn);
    this.messages.push({ role: "user", content: question });
    const follow = () => { this.talk.scrollTop = this.talk.scrollHeight; };
    const began = performance.now();
    const seen = { model: "", first: null, last: null, tokens: 0 };
    const tell = () => told.replaceChildren(make("b", {}, seen.model), summary(seen));
    try {
      const system = settings.system ? [{ role: "system", content: settings.system }] : [];
      const body = {
        model: this.model.value, messages: [...system, ...this.messages], stream: true,
        stream_options: { include_usage: true }, temperature: settings.temperature, max_tokens: settings.maxTokens,
      };
      for await (const event of events("v1/chat/completions", body, signal)) {
        seen.model = event.model;
        const text = event.choices[0]?.delta.content ?? "";
        if (event.choices.length) {
          seen.last = performance.now() - began;
          seen.first ??= seen.last;
        }
        if (event.usage) seen.tokens = event.usage.completion_tokens;
        words.append(text);
        tell();
        follow();
      }
    } catch (error) {
      if (error.name === "AbortError") told.append(" stopped");
      else turn.append(make("span", { className: "problem" }, error.message));
    } finally {
      turn.classList.remove("writing");
      this.messages.push({ role: "assistant", content: words.textContent });
      follow();
    }
  }
}

function summary({ first, last, tokens }) {
  const parts = first === null ? [] : [`first token ${milliseconds(first)}`];
  if (tokens) parts.push(`${tokens} tokens`);
  if (tokens > 1 && last > first) parts.push(`${(1000 * (tokens - 1) / (last - first)).toFixed(1)} tokens/s`);
  return parts.map((part) => ` · ${part}`).join("");
}

// Server-sent events of an OpenAI stream, parsed.
async function* events(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) {
    if (response.status === 401) $("key-form").hidden = false;
    throw new Error((await response.json()).error?.message ?? `status ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Headings, tables and paragraphs: what a model card is made of. As text nodes, never as HTML.
function markdown(text) {
  const found = [];
  for (const block of text.trim().split(/\n\n+/)) {
    const lines = block.split("\n");
    const heading = /^(#+) (.*)$/.exec(lines[0]);
    if (heading) found.push(make(heading[1].length === 1 ? "h3" : "h4", {}, heading[2]));
    else if (lines[0].startsWith("|")) {
      const rows = lines.filter((line) => !/^[|\s-]+$/.test(line)).map((line) => line.slice(1, -1).split(" | "));
      found.push(make("table", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell.trim()))))));
    } else found.push(make("p", {}, block));
  }
  return found;
}

// ---- the form --------------------------------------------------------------------------------------------------

const sides = [new Side(0), new Side(1)];

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || asking) return;
  $("question").value = "";
  asking = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const settings = {
    system: $("system").value.trim(), temperature: Number($("temperature").value), maxTokens: Number($("max-tokens").value),
  };
  await Promise.all(sides.map((side) => side.ask(question, settings, asking.signal)));
  asking = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("question").focus();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => asking?.abort());
$("clear").addEventListener("click", () => sides.forEach((side) => side.clear()));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  look();
});

async function lookAgain() {
  if (!document.hidden) await look();
  setTimeout(lookAgain, LOOK_EVERY_MS);
}
lookAgain();
$("question").focus();
