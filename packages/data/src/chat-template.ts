/**
 * Chat templates are programs from somebody else's repository. They are rendered by an interpreter (no eval) in a worker thread with a time limit, because
 * the interpreter has no step limit of its own: an endless loop ends the worker, not the process.
 */
import { createRequire } from 'node:module';
import { Worker } from 'node:worker_threads';
import { LcError } from '@lc/tensor';

/** One turn of a conversation, as the template sees it. */
export interface ChatMessage {
  role: string;
  content: unknown;
  [key: string]: unknown;
}

/** What a template is given beside the messages. */
export interface RenderOptions {
  addGenerationPrompt?: boolean;
  tools?: unknown[];
  /** Further template variables, e.g. reasoning_effort. */
  kwargs?: Record<string, unknown>;
}

/** Special tokens, date and time limit of a template. */
export interface ChatTemplateOptions {
  /** Milliseconds per render; default 10,000. */
  timeout?: number;
  /** What `strftime_now` sees. Default 1970-01-01: a template that prints today's date would make training data depend on the day. */
  date?: Date;
  bosToken?: string | null;
  eosToken?: string | null;
}

// Plain JavaScript for `new Worker(code, { eval: true })`: it must run from src and from dist alike.
const workerSource = `
const { parentPort, workerData } = require('node:worker_threads');
const { Template } = require(workerData.jinja);
const days = ['Sunday','Monday','Tuesday','Wednesday','Thursday','Friday','Saturday'];
const months = ['January','February','March','April','May','June','July','August','September','October','November','December'];
const d = new Date(workerData.date);
const hour12 = d.getUTCHours() % 12 || 12;
const dayOfYear = Math.floor((d - Date.UTC(d.getUTCFullYear(), 0, 1)) / 86400000) + 1;
const fields = {
  Y: () => String(d.getUTCFullYear()), y: (w) => w(d.getUTCFullYear() % 100), m: (w) => w(d.getUTCMonth() + 1), d: (w) => w(d.getUTCDate()),
  e: () => String(d.getUTCDate()).padStart(2), j: (w) => w(dayOfYear, 3), H: (w) => w(d.getUTCHours()), I: (w) => w(hour12), M: (w) => w(d.getUTCMinutes()),
  S: (w) => w(d.getUTCSeconds()), p: () => (d.getUTCHours() < 12 ? 'AM' : 'PM'), B: () => months[d.getUTCMonth()], b: () => months[d.getUTCMonth()].slice(0, 3),
  A: () => days[d.getUTCDay()], a: () => days[d.getUTCDay()].slice(0, 3), Z: () => 'UTC', z: () => '+0000', '%': () => '%',
};
const padded = (n, width = 2) => String(n).padStart(width, '0');
// "%-d" is "%d" without padding.
const strftime = (format) => format.replace(/%(-?)([a-zA-Z%])/g, (whole, bare, code) => {
  if (!Object.hasOwn(fields, code)) throw new Error("strftime_now: '" + whole + "' is not supported");
  return fields[code](bare ? String : padded);
});
let template;
let problem;
try {
  // The interpreter's own strftime_now reads the clock and cannot be replaced: call ours by another name.
  template = new Template(workerData.template.replace(/\\bstrftime_now\\s*\\(/g, 'lc_strftime_now('));
} catch (error) {
  problem = String(error && error.message || error);
}
parentPort.on('message', ({ id, variables }) => {
  if (problem !== undefined) return parentPort.postMessage({ id, error: problem });
  try {
    parentPort.postMessage({ id, text: template.render({ ...workerData.tokens, ...variables, lc_strftime_now: strftime }) });
  } catch (error) {
    parentPort.postMessage({ id, error: String(error && error.message || error) });
  }
});
`;

interface Pending {
  resolve(text: string): void;
  reject(error: Error): void;
}

/** A template and its worker. Call `close()` (or `await using`) at the end. */
export class ChatTemplate implements AsyncDisposable {
  private worker: Worker | undefined;
  private pending: Pending | undefined;
  private queue: Promise<unknown> = Promise.resolve();
  private readonly timeout: number;

  constructor(
    private readonly template: string,
    private readonly options: ChatTemplateOptions = {},
  ) {
    this.timeout = options.timeout ?? 10_000;
  }

  /**
   * The text of a conversation.
   * @throws ERR_LC_TEMPLATE when the template does not parse, raises, or takes longer than the time limit.
   */
  render(messages: readonly ChatMessage[], options: RenderOptions = {}): Promise<string> {
    const next = this.queue.then(() => this.renderNow(messages, options));
    this.queue = next.catch(() => undefined);
    return next;
  }

  /** Waits for renderings in flight and ends the worker. */
  async close(): Promise<void> {
    await this.queue;
    await this.worker?.terminate();
    this.worker = undefined;
  }
  /** For `await using`: `close()`. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  private renderNow(messages: readonly ChatMessage[], options: RenderOptions): Promise<string> {
    const worker = this.start();
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        finish();
        this.worker = undefined;
        void worker.terminate();
        reject(
          new LcError(
            'ERR_LC_TEMPLATE',
            `chat template: not done after ${this.timeout} ms, stopped; check its loops, or raise the timeout for very long conversations`,
          ),
        );
      }, this.timeout);
      const finish = (): void => {
        clearTimeout(timer);
        this.pending = undefined;
        worker.unref();
      };
      this.pending = {
        resolve: (text) => {
          finish();
          resolve(text);
        },
        reject: (error) => {
          finish();
          reject(error);
        },
      };
      worker.ref();
      try {
        const variables = {
          messages,
          tools: options.tools,
          add_generation_prompt: options.addGenerationPrompt ?? false,
          ...options.kwargs,
        };
        worker.postMessage({ id: 0, variables });
      } catch (cause) {
        this.pending.reject(
          new LcError('ERR_LC_TEMPLATE', `chat template: messages must be plain JSON data: ${(cause as Error).message}`, { cause }),
        );
      }
    });
  }

  private start(): Worker {
    if (this.worker) return this.worker;
    const { bosToken, eosToken, date } = this.options;
    const worker = new Worker(workerSource, {
      eval: true,
      workerData: {
        template: this.template,
        jinja: createRequire(import.meta.url).resolve('@huggingface/jinja'),
        date: (date ?? new Date(0)).getTime(),
        tokens: { bos_token: bosToken ?? '', eos_token: eosToken ?? '' },
      },
      resourceLimits: { maxOldGenerationSizeMb: 1024 },
    });
    worker.unref();
    // A worker that was stopped may still have an answer on its way: it is not the next one's.
    worker.on('message', (message: { text?: string; error?: string }) => {
      if (this.worker !== worker) return;
      if (message.text !== undefined) this.pending?.resolve(message.text);
      else this.pending?.reject(new LcError('ERR_LC_TEMPLATE', `chat template: ${message.error}`));
    });
    worker.on('error', (error) => {
      if (this.worker !== worker) return;
      this.worker = undefined;
      this.pending?.reject(new LcError('ERR_LC_TEMPLATE', `chat template: ${error.message}`, { cause: error }));
    });
    this.worker = worker;
    return worker;
  }
}
