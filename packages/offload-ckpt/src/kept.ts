/** Where layers keep what they offer to keep from forward to backward: a second store, of bytes, with a row for the last chunks of each such layer. */
import { type Layer, LcTypeError } from '@lc/tensor';
import type { KeepOptions } from './options.js';
import type { StoredChunk } from './slots.js';
import { ActivationStore } from './store.js';

/** Which layers keep something, and how many bytes per token: the last `most` of those that offer it, all of one size. */
export function keptLayers(offers: readonly number[], most = Number.POSITIVE_INFINITY): { layers: number[]; bytesPerToken: number } {
  const bytesPerToken = Math.max(0, ...offers);
  const all = offers.flatMap((bytes, layer) => (bytes > 0 ? [layer] : []));
  return { layers: all.slice(Math.max(0, all.length - most)), bytesPerToken };
}

/**
 * The first of `tokens` tokens of which something is kept: a whole number of chunks, such that from there on at most `most` tokens lie. With `most` below one chunk it may be
 * `tokens` or beyond: then nothing is kept.
 */
export const keptFrom = (tokens: number, chunk: number, most = Number.POSITIVE_INFINITY): number =>
  most >= tokens ? 0 : Math.ceil((tokens - most) / chunk) * chunk;

export class KeptRows implements Disposable {
  /** The first token of the sequence of which something is kept. */
  from = 0;
  private length: number;

  private constructor(
    readonly store: ActivationStore,
    private readonly layers: readonly number[],
    tokens: number,
  ) {
    this.length = tokens;
    this.reset(tokens);
  }

  /** null where no layer keeps anything. @throws LcTypeError ERR_LC_ARGUMENT; LcError ERR_LC_OUT_OF_MEMORY */
  static make(layers: readonly Layer[], like: ActivationStore, keep: KeepOptions): KeptRows | null {
    const { layers: most, tokens, deviceBytes } = keep;
    for (const [name, value] of [['layers', most] as const, ['tokens', tokens] as const]) {
      if (value !== undefined && !(Number.isSafeInteger(value) && value >= 0))
        throw new LcTypeError('ERR_LC_ARGUMENT', `LayerSchedule: keep.${name} must be a whole number >= 0, got ${String(value)}`);
    }
    const kept = keptLayers(
      layers.map((layer) => layer.keepBytes?.(like.plan.dtype) ?? 0),
      most,
    );
    const from = keptFrom(like.tokens, like.chunk, tokens);
    if (kept.layers.length === 0 || from >= like.tokens) return null;
    const store = new ActivationStore({
      ...{ device: like.device, dtype: 'u8', computeStream: like.compute, dx: 'none', label: 'kept' },
      ...{ layers: kept.layers.length, tokens: like.tokens - from, chunk: like.chunk, width: kept.bytesPerToken },
      ...(deviceBytes === undefined ? {} : { deviceBytes }),
      streams: like.streamFactory,
    });
    return new KeptRows(store, kept.layers, like.tokens);
  }

  /** Forgets all content, and sets the length of the sequence to come: of a shorter one the last tokens are kept as well. */
  reset(tokens: number): void {
    this.length = tokens;
    this.from = keptFrom(tokens, this.store.chunk, this.store.tokens);
    this.store.reset(Math.max(1, tokens - this.from));
  }

  /** By chunk of the sequence: the place of what a layer keeps of it, or null; null where the layer keeps nothing at all. */
  row(layer: number): readonly (StoredChunk | null)[] | null {
    const row = this.layers.indexOf(layer);
    if (row < 0) return null;
    const { chunk } = this.store;
    const places = this.store.checkpoints[row] as StoredChunk[];
    return Array.from({ length: Math.ceil(this.length / chunk) }, (_, c) =>
      c * chunk < this.from ? null : (places[c - this.from / chunk] as StoredChunk),
    );
  }

  dispose(): void {
    this.store.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
