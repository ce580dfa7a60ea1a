import { empty, LcError, LcTypeError, type Tensor } from '@lc/tensor';
import type { ActivationStore } from './store.js';

/** Keeps every layer's output of the forward, to hold recomputed ones against, bit for bit. For tests: it costs what checkpointing saves. CPU only. */
export class RecomputeCheck implements Disposable {
  private readonly outputs: Tensor;

  constructor(private readonly store: ActivationStore) {
    if (store.device !== 'cpu')
      throw new LcTypeError(
        'ERR_LC_DEVICE',
        `LayerSchedule: verifyRecompute reads results at once and needs device 'cpu', got '${store.device}'`,
      );
    this.outputs = empty([store.layers, store.tokens, store.width], { dtype: store.plan.dtype, device: store.device, label: 'verify' });
  }

  private part(layer: number, start: number, length: number): Tensor {
    return this.outputs.view([this.store.layers * this.store.tokens, this.store.width]).rows(layer * this.store.tokens + start, length);
  }

  keep(layer: number, start: number, out: Tensor): void {
    this.store.compute.copy(this.part(layer, start, out.shape[0] as number), out);
  }

  /** @throws LcError ERR_LC_RECOMPUTE */
  compare(layer: number, start: number, out: Tensor): void {
    const bytes = (t: Tensor): Uint8Array => t.reinterpret('u8', [t.nbytes]).data<Uint8Array>();
    const want = bytes(this.part(layer, start, out.shape[0] as number));
    const got = bytes(out);
    const at = got.findIndex((byte, i) => byte !== want[i]);
    if (at < 0) return;
    const element = Math.floor(at / (out.nbytes / out.numel));
    const width = this.store.width;
    throw new LcError(
      'ERR_LC_RECOMPUTE',
      `LayerSchedule: layer ${layer} recomputed another output than in the forward, first at token ${start + Math.floor(element / width)}, ` +
        `feature ${element % width}; a layer must be deterministic (same chunks, same kernels, counter-based dropout) and its weights unchanged within a step`,
    );
  }

  dispose(): void {
    this.outputs.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
