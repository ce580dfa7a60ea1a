// npm test: starts the service, reads events, cancels in both ways, and looks for what is left over. On the CPU, in seconds.
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { memory } from '@lc/tensor';
import { createService } from './service.js';

type Event = {
  type: string;
  id?: string;
  step?: number;
  loss?: number;
  reason?: string;
  adapter?: string;
  code?: string;
  message?: string;
};

const runsFolder = mkdtempSync(join(tmpdir(), 'service-'));
const { server } = createService({ modelFolder: process.env.MODEL ?? '../quickstart/tiny-gpt-oss', runsFolder });
let url: string;
before(async () => {
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/runs`;
});
after(async () => {
  server.closeAllConnections();
  await new Promise((resolve) => server.close(resolve));
  rmSync(runsFolder, { recursive: true, force: true });
});

const texts = Array.from({ length: 40 }, (_, i) =>
  `The ship number ${i} left the harbour in the morning, and nobody saw it again. `.repeat(8),
);
const post = (body: object | string, init: RequestInit = {}) =>
  fetch(url, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: typeof body === 'string' ? body : JSON.stringify(body),
    ...init,
  });
const running = async () => ((await (await fetch(url)).json()) as { running: string | null }).running;

/** The events of a server-sent stream, as they come. */
async function* events(response: Response): AsyncGenerator<Event> {
  assert.equal(response.headers.get('content-type'), 'text/event-stream');
  let buffered = '';
  for await (const text of (response.body as ReadableStream<Uint8Array>).pipeThrough(new TextDecoderStream())) {
    buffered += text;
    for (let end = buffered.indexOf('\n\n'); end >= 0; end = buffered.indexOf('\n\n')) {
      const data = /^data: (.*)$/m.exec(buffered.slice(0, end))?.[1] as string;
      buffered = buffered.slice(end + 2);
      yield JSON.parse(data) as Event;
    }
  }
}
/** Nothing runs, and no tensor is alive. */
async function clean(): Promise<void> {
  for (let i = 0; i < 600 && (await running()); i++) await sleep(50);
  assert.equal(await running(), null);
  for (const [device, { liveBytes }] of Object.entries(memory().devices)) assert.equal(liveBytes, 0, `bytes left on ${device}`);
}

test('a run to its end', async () => {
  const all: Event[] = [];
  for await (const event of events(await post({ texts, maxSteps: 4, learningRate: 5e-3, maxSeqLength: 512 }))) all.push(event);
  assert.equal(all[0]?.type, 'run');
  assert.equal(all[1]?.type, 'plan');
  const steps = all.filter((event) => event.type === 'step');
  assert.deepEqual(
    steps.map(({ step }) => step),
    [1, 2, 3, 4],
  );
  console.log(`losses ${steps.map(({ loss }) => loss?.toFixed(2)).join(' ')}`);
  assert.ok((steps[3]?.loss as number) < (steps[0]?.loss as number));
  const last = all.at(-1);
  assert.equal(last?.type, 'end');
  assert.equal(last?.reason, 'finished');
  assert.ok(existsSync(join(last?.adapter as string, 'adapter_model.safetensors')));
  await clean();
});

test('cancelled by DELETE, inside a step', async () => {
  let id = '';
  let last: Event | undefined;
  let progress = 0;
  for await (const event of events(await post({ texts, maxSteps: 100_000 }))) {
    last = event;
    if (event.type === 'run') id = event.id as string;
    if (event.type === 'progress' && ++progress === 3) {
      assert.equal(await running(), id); // answers while it trains
      assert.equal((await post({ texts })).status, 409);
      assert.equal((await fetch(`${url}/${id}`, { method: 'DELETE' })).status, 202);
    }
  }
  assert.equal(last?.type, 'end');
  assert.equal(last?.reason, 'aborted');
  assert.ok(existsSync(join(last?.adapter as string, 'adapter_model.safetensors')));
  await clean();
  assert.equal((await fetch(`${url}/${id}`, { method: 'DELETE' })).status, 404);
});

test('cancelled because the client went away', async () => {
  const client = new AbortController();
  await assert.rejects(async () => {
    for await (const event of events(await post({ texts, maxSteps: 100_000 }, { signal: client.signal }))) {
      if (event.type === 'step') client.abort();
    }
  }, /abort/i);
  await clean();
});

test('a request that cannot be met', async () => {
  assert.equal((await post('{')).status, 400);
  assert.equal((await post({ texts: [] })).status, 400);
  assert.equal((await post({ texts, maxSteps: -1 })).status, 400);
  assert.equal((await post({ texts }, { headers: { 'content-type': 'text/plain' } })).status, 415);
  assert.equal((await fetch(`${url}/none`, { method: 'DELETE' })).status, 404);
  // What lc refuses comes as an event, with its code: this model knows no position beyond 2,048.
  const all: Event[] = [];
  for await (const event of events(await post({ texts, maxSeqLength: 1 << 20 }))) all.push(event);
  assert.equal(all.at(-1)?.type, 'error');
  assert.match(all.at(-1)?.code as string, /^ERR_LC_/);
  await clean();
});
