/** Where layers keep what they offer to keep from forward to backward: a second store, of bytes, with a row for each such layer. */
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

export class KeptRows implements Disposable {
  private constructor(
    readonly store: ActivationStore,
    private readonly layers: readonly number[],
  ) {}

  /** null where no layer keeps anything. @throws LcTypeError ERR_LC_ARGUMENT; LcError ERR_LC_OUT_OF_MEMORY */
  static make(layers: readonly Layer[], like: ActivationStore, keep: KeepOptions): KeptRows | null {
    const { layers: most, deviceBytes } = keep;
    if (most !== undefined && !(Number.isSafeInteger(most) && most >= 0))
      throw new LcTypeError('ERR_LC_ARGUMENT', `LayerSchedule: keep.layers must be a whole number >= 0, got ${String(most)}`);
    const kept = keptLayers(
      layers.map((layer) => layer.keepBytes?.(like.plan.dtype) ?? 0),
      most,
    );
    if (kept.layers.length === 0) return null;
    const store = new ActivationStore({
      ...{ device: like.device, dtype: 'u8', computeStream: like.compute, dx: 'none', label: 'kept' },
      ...{ layers: kept.layers.length, tokens: like.tokens, chunk: like.chunk, width: kept.bytesPerToken },
      ...(deviceBytes === undefined ? {} : { deviceBytes }),
      streams: like.streamFactory,
    });
    return new KeptRows(store, kept.layers);
  }

  row(layer: number): readonly StoredChunk[] | null {
    const row = this.layers.indexOf(layer);
    return row < 0 ? null : (this.store.checkpoints[row] as StoredChunk[]);
  }

  dispose(): void {
    this.store.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
