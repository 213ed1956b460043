// Questions to the server beside the stream.

/** Asks, and gives the JSON of the answer. An error is what the server says it is. */
export async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", headers: { "Content-Type": "application/json" }, ...options });
  } catch {
    throw new Error("the server does not answer");
  }
  const text = await answer.text();
  let value = {};
  try {
    value = JSON.parse(text);
  } catch {
    value = { error: text.trim() };
  }
  if (!answer.ok) throw new Error(value.error || `the server answered ${answer.status}`);
  return value;
}

export const path = (model, rest) => `/v1/models/${encodeURIComponent(model)}/${rest}`;
