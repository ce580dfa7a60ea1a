import {
  copy,
  type ExpertLinear,
  empty,
  gemm,
  groupedGemm,
  groupedGemmWeightGrad,
  LcTypeError,
  type Parameter,
  type Pass,
  Scope,
  type Tensor,
  type Workspace,
} from '@lc/tensor';
import { checkLora, type LoraOptions, loraScale, makeLoraParameters } from './lora-parameters.js';
import { native } from './native.js';

/**
 * LoRA on fused experts, as PEFT's `target_parameters` has it for a parameter W [experts, in, out] (gpt-oss `gate_up_proj`, `down_proj`):
 * lora_A [experts * r, in] is [experts, r, in]; lora_B [out, r * experts] is [out, r, experts]; delta_e[i, o] = scale * sum_k B[o, k, e] A[e, k, i].
 *
 * Applied as two low-rank grouped GEMMs, so the dense delta is never formed; lora_B is regrouped by expert once per `open`. There is no dropout: PEFT
 * has none here either. Owns its two parameters, not the base.
 */
export class LoraExpertLinear implements ExpertLinear, Disposable {
  readonly numExperts: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[];
  readonly base: ExpertLinear;
  readonly r: number;
  readonly scale: number;
  /** f32 [experts * r, in]. */
  readonly a: Parameter;
  /** f32 [out, r * experts]. */
  readonly b: Parameter;
  /** The weights are never plain: the update belongs to them. */
  readonly plain = null;
  private opened: Tensor | null = null;
  private readonly scope = new Scope();

  /** @throws ERR_LC_ARGUMENT */
  constructor(options: LoraOptions & { base: ExpertLinear }) {
    checkLora('LoraExpertLinear', options);
    if (options.loraDropout) {
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `LoraExpertLinear '${options.name}': loraDropout must be 0 on fused experts, as in PEFT; set it to 0 or drop target_parameters`,
      );
    }
    const { base, r } = options;
    this.base = base;
    this.numExperts = base.numExperts;
    this.inFeatures = base.inFeatures;
    this.outFeatures = base.outFeatures;
    this.r = r;
    this.scale = loraScale(options);
    ({ a: this.a, b: this.b } = makeLoraParameters(this.scope, options, base.numExperts * r, base.inFeatures, base.outFeatures));
    this.parameters = [...base.parameters, this.a, this.b];
  }

  /** Base and update together, f32 [experts, out, in]. */
  materialize(out: Tensor): void {
    const plain = this.base.plain;
    if (plain) copy(out, plain);
    else this.base.materialize(out);
    this.addDelta(out);
  }

  open(pass: Pass, ws: Workspace): void {
    this.base.open(pass, ws);
    this.opened = this.regrouped(ws);
  }
  /** Forgets the dequantized weight; its memory goes with the workspace. */
  close(): void {
    this.base.close();
    this.opened = null;
  }

  forward(x: Tensor, out: Tensor, offsets: Tensor, ws: Workspace): void {
    this.base.forward(x, out, offsets, ws);
    ws.scoped(() => {
      const h = ws.alloc([x.shape[0] as number, this.r], 'f32');
      groupedGemm({ a: x, b: this.groupedA(), c: h, offsets, transB: true });
      groupedGemm({ a: h, b: this.opened ?? this.regrouped(ws), c: out, offsets, transB: true, alpha: this.scale, beta: 1 });
    });
  }

  backward(x: Tensor, dout: Tensor, dx: Tensor | null, offsets: Tensor, ws: Workspace, accumulate = false): void {
    this.base.backward(x, dout, dx, offsets, ws, accumulate);
    ws.scoped(() => {
      const rows = x.shape[0] as number;
      const a = this.groupedA();
      const b = this.opened ?? this.regrouped(ws);
      const h = ws.alloc([rows, this.r], 'f32');
      const dh = ws.alloc([rows, this.r], 'f32');
      const db = ws.alloc([this.numExperts, this.outFeatures, this.r], 'f32');
      groupedGemm({ a: x, b: a, c: h, offsets, transB: true });
      groupedGemmWeightGrad({ a: dout, b: h, c: db, offsets, alpha: this.scale });
      native().scatterExpertB({ b: this.b.grad, grouped: db });
      groupedGemm({ a: dout, b, c: dh, offsets, alpha: this.scale });
      groupedGemmWeightGrad({ a: dh, b: x, c: this.a.grad.view(a.shape), offsets, beta: 1 });
      if (dx) groupedGemm({ a: dh, b: a, c: dx, offsets, beta: 1 });
    });
  }

  /** f32 [experts, out, in] += the update. For merging and for checks. */
  addDelta(weight: Tensor): void {
    const a = this.groupedA();
    using scope = new Scope();
    const b = scope.own(this.regroupedCopy());
    for (let e = 0; e < this.numExperts; e++) {
      gemm({
        a: b.rows(e, 1).view([this.outFeatures, this.r]),
        b: a.rows(e, 1).view([this.r, this.inFeatures]),
        c: weight.rows(e, 1).view([this.outFeatures, this.inFeatures]),
        alpha: this.scale,
        beta: 1,
      });
    }
  }

  /** Gives A, B and their gradients back; the base stays its owner's. */
  dispose(): void {
    this.scope.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private groupedA(): Tensor {
    return this.a.value.view([this.numExperts, this.r, this.inFeatures]);
  }
  private regrouped(ws: Workspace): Tensor {
    const grouped = ws.alloc([this.numExperts, this.outFeatures, this.r], 'f32');
    native().gatherExpertB({ b: this.b.value, grouped });
    return grouped;
  }
  private regroupedCopy(): Tensor {
    const grouped = empty([this.numExperts, this.outFeatures, this.r], { label: 'lora' });
    native().gatherExpertB({ b: this.b.value, grouped });
    return grouped;
  }
}
