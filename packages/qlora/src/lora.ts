import { gemm, LcTypeError, type Linear, type Parameter, type Pass, Scope, type Span, type Tensor, type Workspace } from '@lc/tensor';
import { checkLora, type LoraOptions, loraScale, makeLoraParameters, siteOf } from './lora-parameters.js';
import { native } from './native.js';

/**
 * A frozen linear plus a low-rank update (Hu et al., LoRA, 2021): y = base(x) + scale * dropout(x) A^T B^T. The base may be plain or quantized. Owns its
 * two parameters, not the base.
 *
 * Dropout draws from a counter (Philox) by `Span.dropoutSeed`, module, token index and feature: a span that is recomputed, or cut differently, draws
 * the same. Without `dropoutSeed` nothing is dropped.
 */
export class LoraLinear implements Linear, Disposable {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[];
  readonly base: Linear;
  readonly r: number;
  readonly scale: number;
  readonly loraDropout: number;
  /** f32 [r, in]. */
  readonly a: Parameter;
  /** f32 [out, r]. */
  readonly b: Parameter;
  private readonly site: number;
  private readonly scope = new Scope();

  /** @throws ERR_LC_ARGUMENT */
  constructor(options: LoraOptions & { base: Linear }) {
    checkLora('LoraLinear', options);
    const { base } = options;
    this.base = base;
    this.inFeatures = base.inFeatures;
    this.outFeatures = base.outFeatures;
    this.r = options.r;
    this.scale = loraScale(options);
    this.loraDropout = options.loraDropout ?? 0;
    this.site = siteOf(options.name);
    ({ a: this.a, b: this.b } = makeLoraParameters(this.scope, options, options.r, base.inFeatures, base.outFeatures));
    this.parameters = [...base.parameters, this.a, this.b];
  }

  open(pass: Pass, ws: Workspace): void {
    this.base.open(pass, ws);
  }
  /** Forgets the dequantized weight; its memory goes with the workspace. */
  close(): void {
    this.base.close();
  }

  forward(x: Tensor, out: Tensor, at: Span, ws: Workspace): void {
    this.base.forward(x, out, at, ws);
    ws.scoped(() => {
      const h = ws.alloc([x.shape[0] as number, this.r], 'f32');
      gemm({ a: this.dropped(x, at, ws), b: this.a.value, c: h, transB: true });
      gemm({ a: h, b: this.b.value, c: out, transB: true, alpha: this.scale, beta: 1 });
    });
  }

  backward(x: Tensor, dout: Tensor, dx: Tensor | null, at: Span, ws: Workspace, accumulate = false): void {
    this.base.backward(x, dout, dx, at, ws, accumulate);
    ws.scoped(() => {
      const rows = x.shape[0] as number;
      const xd = this.dropped(x, at, ws);
      const h = ws.alloc([rows, this.r], 'f32');
      const dh = ws.alloc([rows, this.r], 'f32');
      gemm({ a: xd, b: this.a.value, c: h, transB: true });
      gemm({ a: dout, b: h, c: this.b.grad, transA: true, alpha: this.scale, beta: 1 });
      gemm({ a: dout, b: this.b.value, c: dh, alpha: this.scale });
      gemm({ a: dh, b: xd, c: this.a.grad, transA: true, beta: 1 });
      if (!dx) return;
      if (xd === x) gemm({ a: dh, b: this.a.value, c: dx, beta: 1 });
      else {
        // xd is not needed any more: its memory takes the gradient before the mask.
        gemm({ a: dh, b: this.a.value, c: xd });
        this.drop(xd, dx, at, true);
      }
    });
  }

  /** Effective weight minus the base's: f32 [out, in] += scale * B A. For merging and for checks. */
  addDelta(weight: Tensor): void {
    gemm({ a: this.b.value, b: this.a.value, c: weight, alpha: this.scale, beta: 1 });
  }

  /** Gives A, B and their gradients back; the base stays its owner's. */
  dispose(): void {
    this.scope.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private dropped(x: Tensor, at: Span, ws: Workspace): Tensor {
    if (this.loraDropout === 0 || at.dropoutSeed === undefined) return x;
    const out = ws.alloc([x.shape[0] as number, this.inFeatures]);
    this.drop(x, out, at, false);
    return out;
  }
  private drop(x: Tensor, out: Tensor, at: Span, accumulate: boolean): void {
    const seed = at.dropoutSeed as number;
    if (!Number.isSafeInteger(seed))
      throw new LcTypeError('ERR_LC_ARGUMENT', `LoraLinear: Span.dropoutSeed must be a whole number, got ${seed}`);
    native().dropout({ x, out, p: this.loraDropout, seed, site: this.site, start: at.start, accumulate });
  }
}
