// openai-node and Vercel's AI SDK against an endpoint: URL BASE ADAPTER; prints what it got as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, base, adapter] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "where is my refund" }];
const whole = await client.chat.completions.create({ model: adapter, messages, max_tokens: 8, temperature: 0 });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ model: adapter, messages, max_tokens: 8, temperature: 0, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";

const provider = createOpenAICompatible({ name: "ftray", baseURL: `${url}/v1`, apiKey: "none", supportsStructuredOutputs: true });
const model = provider(adapter);
const common = { model, temperature: 0, maxRetries: 0 };
const text = await generateText({ ...common, prompt: "where is my refund", maxOutputTokens: 8 });
let pieces = "";
for await (const piece of streamText({ ...common, prompt: "where is my refund", maxOutputTokens: 8 }).textStream) pieces += piece;
const order = z.object({ kind: z.enum(["refund", "delivery"]) });
const made = await generateText({ ...common, prompt: "order 7", maxOutputTokens: 200, output: Output.object({ schema: order }) });
const weather = tool({ description: "Of a city", inputSchema: z.object({ city: z.enum(["Oslo", "Rome"]) }) });
const called = await generateText({ ...common, prompt: "weather?", maxOutputTokens: 200, tools: { weather }, toolChoice: "required" });
console.log(
  JSON.stringify({
    model: whole.model,
    same: streamed === whole.choices[0].message.content,
    retrieved: [(await client.models.retrieve(base)).id, (await client.models.retrieve(adapter)).id],
    "ai sdk": pieces === text.text,
    object: made.output.kind,
    call: called.toolCalls[0].toolName,
    arguments: Object.keys(called.toolCalls[0].input),
  }),
);
