// The page: asks /v1 for one or two models at once and shows their tokens as they come. Text from a model is only
// ever set as textContent.
"use strict";

const $ = (id) => document.getElementById(id);
const BOUNDS = [0.05, 0.2, 0.4, 0.65, 0.9]; // of the classes p0 to p5
let running = null; // the AbortController of what is being written

function headers() {
  const token = $("token").value;
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    $("token-label").hidden = false;
    throw new Error("This server asks for a token.");
  }
  if (!response.ok) throw await refusal(response);
  const models = (await response.json()).data;
  $("left").replaceChildren(...models.map((m) => new Option(m.id, m.id)));
  $("right").replaceChildren(new Option("nothing", ""), ...models.map((m) => new Option(m.id, m.id)));
  if (models.length > 1) $("right").value = models[1].id;
  $("kind").value = models.every((m) => m.chat) ? "chat" : "completions";
}

function makePane(model, prompt) {
  const pane = document.createElement("section");
  pane.className = "pane";
  const [title, figures, text] = ["h2", "p", "div"].map((tag) => document.createElement(tag));
  title.textContent = model;
  figures.className = "figures";
  text.className = "text";
  const before = document.createElement("span");
  before.className = "prompt";
  before.textContent = prompt;
  text.append(before);
  pane.append(title, figures, text);
  $("panes").append(pane);
  return { figures, text, count: 0, logProb: 0, started: performance.now() };
}

// One choice of a chunk, of either API, as {text, logProb, alternatives: [[token, logProb], ...]}.
function readChoice(choice) {
  const text = choice.delta ? choice.delta.content ?? "" : choice.text;
  const chat = choice.logprobs?.content?.[0];
  if (chat) {
    return { text, logProb: chat.logprob, alternatives: chat.top_logprobs.map((t) => [t.token, t.logprob]) };
  }
  const logProb = choice.logprobs?.token_logprobs?.[0] ?? null;
  return { text, logProb, alternatives: Object.entries(choice.logprobs?.top_logprobs?.[0] ?? {}) };
}

const percent = (logProb) => `${(100 * Math.exp(logProb)).toFixed(1)} %`;

function show(pane, { text, logProb, alternatives }) {
  if (logProb !== null) {
    pane.count += 1;
    pane.logProb += logProb;
  }
  const span = document.createElement("span");
  span.textContent = text;
  if (logProb !== null) {
    const probability = Math.exp(logProb);
    const level = BOUNDS.findIndex((bound) => probability < bound);
    span.className = `token p${level < 0 ? BOUNDS.length : level}`;
    span.dataset.probability = probability.toFixed(4);
    span.title = [percent(logProb), ...alternatives.map(([t, l]) => `${JSON.stringify(t)} ${percent(l)}`)].join("\n");
  }
  pane.text.append(span);
  const seconds = (performance.now() - pane.started) / 1000;
  const perplexity = pane.count ? Math.exp(-pane.logProb / pane.count).toFixed(2) : "-";
  pane.figures.textContent =
    `${pane.count} tokens, ${(pane.count / seconds).toFixed(0)} a second, perplexity ${perplexity}`;
}

async function write(model, kind, settings, signal) {
  const pane = makePane(model, kind === "chat" ? "" : settings.prompt);
  const { prompt, ...rest } = settings;
  const body =
    kind === "chat"
      ? { ...rest, model, messages: [{ role: "user", content: prompt }], logprobs: true, top_logprobs: 5, stream: true }
      : { ...rest, model, prompt, logprobs: 5, stream: true };
  const path = kind === "chat" ? "/v1/chat/completions" : "/v1/completions";
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let tail = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (tail + value).split("\n\n");
    tail = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) show(pane, readChoice(choice));
    }
  }
}

async function submit(event) {
  event.preventDefault();
  if (running) return;
  $("message").textContent = "";
  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  try {
    if (!$("left").options.length) await loadModels();
    $("panes").replaceChildren();
    const settings = {
      prompt: $("prompt").value,
      temperature: Number($("temperature").value),
      top_p: Number($("top-p").value),
      max_tokens: Number($("length").value),
      ...($("seed").value ? { seed: Number($("seed").value) } : {}),
    };
    const models = [$("left").value, $("right").value].filter((name) => name);
    const writing = models.map((model) => write(model, $("kind").value, settings, running.signal));
    const failed = (await Promise.allSettled(writing)).find((result) => result.status === "rejected");
    if (failed && failed.reason.name !== "AbortError") throw failed.reason;
  } catch (error) {
    $("message").textContent = error.message;
  } finally {
    running = null;
    $("go").disabled = false;
    $("stop").disabled = true;
  }
}

function showRanges() {
  for (const id of ["temperature", "top-p"]) $(`${id}-value`).value = $(id).value;
}

$("form").addEventListener("submit", submit);
$("form").addEventListener("input", showRanges);
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("token").addEventListener("change", () => loadModels().catch((error) => ($("message").textContent = error.message)));
showRanges();
loadModels().catch((error) => ($("message").textContent = error.message));
