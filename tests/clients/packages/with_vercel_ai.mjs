// Vercel's AI SDK; prints what common.py's main does.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The packages lie where make clients puts them.
const [node_modules, path] = process.argv.slice(2);
const require = createRequire(`${node_modules}/`);
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateText, jsonSchema, stepCountIs, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const model = createOpenAICompatible({ name: "flashmoe", baseURL: process.env.OPENAI_BASE_URL })("any");
const tools = {
  read_file: tool({
    description: "Reads a file.",
    inputSchema: jsonSchema({ type: "object", properties: { path: { type: "string" } }, required: ["path"] }),
    execute: async ({ path }) => readFileSync(path, "utf8"),
  }),
};
const messages = [{ role: "user", content: `Read the file ${path} and tell me the code word` }];
const first = await generateText({ model, tools, messages, stopWhen: stepCountIs(3) });
messages.push(...first.response.messages, { role: "user", content: "What was the code word?" });
const again = await generateText({ model, tools, messages });
console.log(
  JSON.stringify({ first: first.text, again: again.text, cached: again.usage.inputTokenDetails?.cacheReadTokens ?? null }),
);
