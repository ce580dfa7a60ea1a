// Fine-tuning over HTTP.
//   POST   /runs       { texts, maxSteps?, learningRate?, maxSeqLength? }: starts one; the response is its event stream (server-sent events)
//   DELETE /runs/:id   cancels it
//   GET    /runs       the id of the run that is going on, or null
// A run belongs to the request that started it: it is cancelled, too, when that client disconnects.
import { randomUUID } from 'node:crypto';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { join } from 'node:path';
import { fineTune, type Job } from './fine-tune.js';

class HttpError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

export function createService({ modelFolder, runsFolder }: { modelFolder: string; runsFolder: string }) {
  let current: { id: string; abort: AbortController } | null = null; // a device trains one model at a time

  const server = createServer((request, response) => {
    handle(request, response).catch((error: unknown) => {
      if (response.headersSent) return response.destroy();
      const status = error instanceof HttpError ? error.status : 500;
      reply(response, status, { error: error instanceof Error ? error.message : String(error) });
    });
  });

  async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const [, collection, id] = (request.url ?? '').split('/');
    if (collection !== 'runs') throw new HttpError(404, 'no such path');
    if (request.method === 'GET' && !id) return reply(response, 200, { running: current?.id ?? null });
    if (request.method === 'POST' && !id) return run(await readJob(request), response);
    if (request.method === 'DELETE' && id) {
      if (current?.id !== id) throw new HttpError(404, `no run ${id} is going on`);
      current.abort.abort('DELETE');
      return reply(response, 202, { cancelling: id });
    }
    throw new HttpError(405, `${request.method} is not for this path`);
  }

  async function run(job: Job, response: ServerResponse): Promise<void> {
    if (current) throw new HttpError(409, `run ${current.id} is going on`);
    const id = randomUUID();
    const abort = new AbortController();
    current = { id, abort };
    response.on('close', () => abort.abort('the client has gone')); // after the end of the run nobody listens to it any more

    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
    const send = (type: string, event: object) => {
      if (response.destroyed) return;
      if (type === 'progress' && response.writableNeedDrain) return; // a slow client misses some of these, and costs no memory
      response.write(`event: ${type}\ndata: ${JSON.stringify({ type, ...event })}\n\n`);
    };
    send('run', { id });
    try {
      await fineTune(modelFolder, join(runsFolder, id), job, abort.signal, (event) => send(event.type, event));
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException; // lc's errors have a stable code, and say what to do
      send('error', { code, message });
    } finally {
      current = null;
      response.end();
    }
  }

  return { server, cancel: (why: string) => current?.abort.abort(why) };
}

function reply(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));
}

const MAX_BODY = 64 << 20;
async function readJob(request: IncomingMessage): Promise<Job> {
  // A page of another site can make a browser post a form or plain text here, but not JSON.
  if (!request.headers['content-type']?.startsWith('application/json')) throw new HttpError(415, 'expected application/json');
  const parts: Buffer[] = [];
  let size = 0;
  for await (const part of request as AsyncIterable<Buffer>) {
    size += part.length;
    if (size > MAX_BODY) throw new HttpError(413, `a body has at most ${MAX_BODY} bytes`);
    parts.push(part);
  }
  let body: Partial<Job>;
  try {
    body = JSON.parse(Buffer.concat(parts).toString()) as Partial<Job>;
  } catch {
    throw new HttpError(400, 'the body is not JSON');
  }
  const { texts, maxSteps = 20, learningRate = 2e-4, maxSeqLength = 1024 } = body ?? {};
  if (!Array.isArray(texts) || texts.length === 0 || !texts.every((text) => typeof text === 'string' && text))
    throw new HttpError(400, 'texts: expected strings, at least one');
  for (const [name, value] of Object.entries({ maxSteps, maxSeqLength }))
    if (!Number.isSafeInteger(value) || value < 1) throw new HttpError(400, `${name}: expected a whole number above 0`);
  if (!(Number(learningRate) > 0)) throw new HttpError(400, 'learningRate: expected a number above 0');
  return { texts, maxSteps, learningRate, maxSeqLength };
}
