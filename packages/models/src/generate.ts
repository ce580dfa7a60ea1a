import { setImmediate as nextTurn } from 'node:timers/promises';
import { copy, type Device, empty, fromTypedArray, LcError, LcTypeError, type Span, Workspace } from '@lc/tensor';
import type { CausalLM } from './causal-lm.js';
import { checkSampleOptions, type SampleOptions, sampleToken } from './sample.js';

/** How to choose tokens, and when to stop. */
export interface GenerateOptions extends SampleOptions {
  /** Default 64. */
  maxNewTokens?: number;
  /** Generation stops before any of these. Default: the model's. */
  eosTokenId?: number | readonly number[];
  /** Tokens of the prompt per forward. Default 512. */
  chunk?: number;
  /** Called with every new token. */
  onToken?: (id: number) => void;
  signal?: AbortSignal;
}

/**
 * Continues a prompt, token by token, with every layer's K and V kept: greedy by default, sampled with a temperature. A check of what was trained; speed is
 * not the point. Dynamic RoPE is fixed for the longest sequence that this call can reach.
 * @returns the new tokens, without the end token
 * @throws ERR_LC_ARGUMENT, ERR_LC_NAN, ERR_LC_ABORTED, ERR_LC_OUT_OF_MEMORY
 */
export async function generate(model: CausalLM, ids: ArrayLike<number>, options: GenerateOptions = {}): Promise<number[]> {
  const { maxNewTokens = 64, chunk = 512, onToken, signal } = options;
  checkSampleOptions(options);
  for (const [name, value] of [
    ['maxNewTokens', maxNewTokens],
    ['chunk', chunk],
  ] as const) {
    if (!Number.isSafeInteger(value) || value < 1)
      throw new LcTypeError('ERR_LC_ARGUMENT', `generate: ${name} must be a whole number of at least 1, got ${value}`);
  }
  if (ids.length === 0)
    throw new LcTypeError('ERR_LC_ARGUMENT', 'generate: the prompt has no tokens; start with a bos token, or with some text');
  const ends = new Set(options.eosTokenId === undefined ? model.config.eosTokenId : [options.eosTokenId].flat());
  const capacity = ids.length + maxNewTokens;
  model.setSequenceLength(capacity);
  using run = new Generation(model, capacity, chunk);
  const out: number[] = [];
  let next = Int32Array.from(ids);
  for (let start = 0; ; start += next.length, next = Int32Array.of(out.at(-1) as number)) {
    const logits = await run.feed(next, start);
    if (signal?.aborted) throw new LcError('ERR_LC_ABORTED', `generate: aborted after ${out.length} tokens`, { cause: signal.reason });
    const id = sampleToken(logits, options, out.length);
    if (ends.has(id)) return out;
    out.push(id);
    onToken?.(id);
    if (out.length === maxNewTokens) return out;
    await nextTurn();
  }
}

/** All layers open at once over one sequence of at most `capacity` tokens. */
class Generation implements Disposable {
  private readonly ws: Workspace;
  private readonly states;

  constructor(
    private readonly model: CausalLM,
    capacity: number,
    private readonly chunk: number,
  ) {
    this.ws = new Workspace({ device: model.device, label: 'generate' });
    try {
      this.states = model.layers.map((layer) => layer.open(capacity, 'forward', this.ws));
    } catch (error) {
      this.ws.dispose();
      throw error;
    }
  }

  /** Runs tokens start .. through the layers; logits after the last of them. */
  async feed(ids: Int32Array, start: number): Promise<Float32Array> {
    const mark = this.ws.mark();
    try {
      const { hiddenSize, vocabSize } = this.model.config;
      const logits = this.ws.alloc([1, vocabSize]);
      for (let done = 0; done < ids.length; done += this.chunk) {
        const part = ids.slice(done, done + this.chunk);
        const at: Span = { start: start + done, length: part.length, docStart: null };
        this.ws.scoped(() => {
          const buffers = [this.ws.alloc([part.length, hiddenSize]), this.ws.alloc([part.length, hiddenSize])] as const;
          const tokens = this.ws.alloc([part.length], 'i32');
          using host = fromTypedArray(part, [part.length], { label: 'generate' });
          copy(tokens, host);
          this.model.embedForward(tokens, buffers[0]);
          let [x, y] = buffers;
          for (const [i, layer] of this.model.layers.entries()) {
            layer.forward(x, y, at, this.states[i] as (typeof this.states)[number], this.ws);
            [x, y] = [y, x];
          }
          if (done + part.length === ids.length) this.model.logits(x.rows(part.length - 1, 1), logits, this.ws);
        });
        await nextTurn();
      }
      using out = empty([1, vocabSize], { device: hostOf(this.model.device), label: 'generate' });
      copy(out, logits);
      return await out.read();
    } finally {
      this.ws.reset(mark);
    }
  }

  dispose(): void {
    for (const [i, layer] of this.model.layers.entries()) layer.close(this.states[i] as (typeof this.states)[number]);
    this.ws.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

const hostOf = (device: Device): Device => (device.startsWith('cuda') ? device : 'cpu');
