import { fill, LcError, LcTypeError, type Parameter, Scope, type Tensor, upload, zeros } from '@lc/tensor';
import { native } from './native.js';

/** Hyperparameters, in torch.optim.AdamW's meaning, and the width of the states. */
export interface AdamWOptions {
  /** Default 1e-3. Change it between steps through `optimizer.lr`. */
  lr?: number;
  /** Default [0.9, 0.999]. */
  betas?: readonly [number, number];
  /** Added to the root, outside it. Default 1e-8. */
  eps?: number;
  /** Decoupled: value *= 1 - lr * weightDecay, before the step. Default 0.01. */
  weightDecay?: number;
  /** 8: blockwise quantized states, for parameters of at least `min8bitSize` elements. Default 32. */
  optimBits?: 8 | 32;
  /** As bitsandbytes: smaller parameters keep 32-bit states. Default 4096. */
  min8bitSize?: number;
}

/** What `state()` gives and `restore()` takes. Tensors are the optimizer's own (no copy). */
export interface OptimizerState {
  /** Steps taken. */
  step: number;
  /** By name: `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`; with 8 bits also `.exp_avg_scale` and `.exp_avg_sq_scale`. */
  tensors: Record<string, Tensor>;
}

/** What a step did. */
export interface StepResult {
  /** Norm of all gradients together, before clipping. NaN or infinite: nothing was updated. */
  gradNorm: number;
  /** Whether the parameters were updated. */
  applied: boolean;
}

interface Slot {
  parameter: Parameter;
  bits: 8 | 32;
  m: Tensor;
  v: Tensor;
  mScale: Tensor | null;
  vScale: Tensor | null;
}

/**
 * AdamW (Loshchilov & Hutter, 2019) with torch.optim.AdamW's arithmetic: bias correction, decoupled weight decay, eps outside the root. 8-bit states
 * follow Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022): dynamic data type, signed for the first moment and unsigned for the
 * second, blocks of 256; steps use the states before they are rounded; a second moment above zero keeps at least the smallest level. Not yet compared with
 * bitsandbytes itself. State is 8 bytes per trained element in 32 bits, 2.03 in 8 bits.
 */
export class AdamW implements Disposable {
  lr: number;
  readonly betas: readonly [number, number];
  readonly eps: number;
  readonly weightDecay: number;
  readonly optimBits: 8 | 32;
  private readonly slots: readonly Slot[];
  private readonly scope = new Scope();
  private steps = 0;

  /** @throws ERR_LC_ARGUMENT (hyperparameters, duplicate names), ERR_LC_DTYPE (parameters that are not f32) */
  constructor(
    readonly parameters: readonly Parameter[],
    options: AdamWOptions = {},
  ) {
    const { lr = 1e-3, betas = [0.9, 0.999], eps = 1e-8, weightDecay = 0.01, optimBits = 32, min8bitSize = 4096 } = options;
    const check = (ok: boolean, what: string, got: unknown): void => {
      if (!ok) throw new LcTypeError('ERR_LC_ARGUMENT', `AdamW: ${what}, got ${String(got)}`);
    };
    check(lr >= 0 && Number.isFinite(lr), 'lr must be a finite number >= 0', lr);
    check(betas.length === 2 && betas.every((beta) => beta >= 0 && beta < 1), 'betas must be two numbers in [0, 1)', betas);
    check(eps >= 0 && Number.isFinite(eps), 'eps must be a finite number >= 0', eps);
    check(weightDecay >= 0 && Number.isFinite(weightDecay), 'weightDecay must be a finite number >= 0', weightDecay);
    check(optimBits === 8 || optimBits === 32, 'optimBits must be 8 or 32', optimBits);
    this.lr = lr;
    this.betas = betas;
    this.eps = eps;
    this.weightDecay = weightDecay;
    this.optimBits = optimBits;
    const names = new Set<string>();
    for (const { name, value, grad } of parameters) {
      check(!names.has(name), 'every parameter needs its own name', `'${name}' twice`);
      names.add(name);
      if (value.dtype !== 'f32' || grad.dtype !== 'f32' || value.numel !== grad.numel) {
        throw new LcTypeError('ERR_LC_DTYPE', `AdamW: '${name}' must have f32 value and grad of one shape, got ${value} and ${grad}`);
      }
    }
    this.slots = parameters.map((parameter) => this.slot(parameter, optimBits === 8 && parameter.value.numel >= min8bitSize ? 8 : 32));
  }

  /** Steps taken. */
  get stepsTaken(): number {
    return this.steps;
  }

  private slot(parameter: Parameter, bits: 8 | 32): Slot {
    const { shape, numel } = parameter.value;
    const make = (size: readonly number[], dtype: 'f32' | 'u8'): Tensor =>
      this.scope.own(zeros(size, { dtype, label: 'optimizer', device: parameter.value.device }));
    const blocks = [Math.ceil(numel / 256)];
    const dtype = bits === 8 ? 'u8' : 'f32';
    return {
      parameter,
      bits,
      m: make(shape, dtype),
      v: make(shape, dtype),
      mScale: bits === 8 ? make(blocks, 'f32') : null,
      vScale: bits === 8 ? make(blocks, 'f32') : null,
    };
  }

  /** Norm of all gradients together, accumulated in f64 in a fixed order. NaN or infinite when one is. */
  gradNorm(): number {
    return native().gradNorm({ grads: this.parameters.map((p) => p.grad) });
  }

  /**
   * One step: gradients are scaled by maxGradNorm / (norm + 1e-6) where the norm is above `maxGradNorm` (torch's clip_grad_norm_), then applied. When the
   * norm is not finite nothing is changed. Gradients are not cleared.
   */
  step(options: { maxGradNorm?: number } = {}): StepResult {
    const { maxGradNorm } = options;
    if (maxGradNorm !== undefined && !(maxGradNorm > 0))
      throw new LcTypeError('ERR_LC_ARGUMENT', `AdamW.step: maxGradNorm must be above 0, got ${maxGradNorm}`);
    const gradNorm = this.gradNorm();
    if (!Number.isFinite(gradNorm)) return { gradNorm, applied: false };
    this.steps++;
    const [beta1, beta2] = this.betas;
    const scalars = {
      beta1,
      beta2,
      eps: this.eps,
      decay: 1 - this.lr * this.weightDecay,
      stepSize: this.lr / (1 - beta1 ** this.steps),
      rootBias2: Math.sqrt(1 - beta2 ** this.steps),
      gradScale: maxGradNorm === undefined ? 1 : Math.min(1, maxGradNorm / (gradNorm + 1e-6)),
    };
    for (const bits of [8, 32] as const) {
      const slots = this.slots.filter((slot) => slot.bits === bits);
      if (slots.length === 0) continue;
      const lists = {
        values: slots.map((s) => s.parameter.value),
        grads: slots.map((s) => s.parameter.grad),
        m: slots.map((s) => s.m),
        v: slots.map((s) => s.v),
      };
      const scales = bits === 8 ? { mScale: slots.map((s) => s.mScale as Tensor), vScale: slots.map((s) => s.vScale as Tensor) } : {};
      native().adamw({ bits, ...lists, ...scales, ...scalars });
    }
    return { gradNorm, applied: true };
  }

  /** Sets all gradients to 0. */
  zeroGrad(): void {
    for (const { grad } of this.parameters) fill(grad, 0);
  }

  /** Step and moments. The tensors are the optimizer's own: copy or write them before the next step. */
  state(): OptimizerState {
    const tensors: Record<string, Tensor> = {};
    for (const { parameter, m, v, mScale, vScale } of this.slots) {
      tensors[`${parameter.name}.exp_avg`] = m;
      tensors[`${parameter.name}.exp_avg_sq`] = v;
      if (mScale) tensors[`${parameter.name}.exp_avg_scale`] = mScale;
      if (vScale) tensors[`${parameter.name}.exp_avg_sq_scale`] = vScale;
    }
    return { step: this.steps, tensors };
  }

  /**
   * Takes a state back, bit for bit: `tensors` gives the data of a name (a typed array or a tensor), e.g. what a safetensors file holds.
   * @throws ERR_LC_ADAPTER listing every name that is missing, extra or of another size; then nothing has been changed
   */
  restore(saved: { step: number; tensors: Record<string, Tensor | ArrayLike<number>> }): void {
    const own = this.state().tensors;
    const given = new Map(Object.entries(saved.tensors).map(([name, t]) => [name, isTensor(t) ? t.data<Float32Array>() : t]));
    const problems: string[] = [];
    if (!Number.isSafeInteger(saved.step) || saved.step < 0) problems.push(`step is ${saved.step}`);
    for (const [name, t] of Object.entries(own)) {
      const data = given.get(name);
      if (!data) problems.push(`'${name}' is missing`);
      else if (data.length !== t.numel || (t.dtype === 'u8') !== data instanceof Uint8Array)
        problems.push(`'${name}' must be ${t.dtype}[${t.shape}], has ${data.length} elements`);
    }
    for (const name of given.keys()) if (!(name in own)) problems.push(`'${name}' belongs to no parameter`);
    if (problems.length > 0) {
      throw new LcError(
        'ERR_LC_ADAPTER',
        `AdamW.restore: the state does not fit these ${this.slots.length} parameters: ${problems.join('; ')}; use the same r, target modules and optimizer bits`,
      );
    }
    for (const [name, t] of Object.entries(own))
      upload(
        t,
        t.dtype === 'u8' ? Uint8Array.from(given.get(name) as ArrayLike<number>) : Float32Array.from(given.get(name) as ArrayLike<number>),
      );
    this.steps = saved.step;
  }

  /** Gives the moments back; parameters stay their owner's. */
  dispose(): void {
    this.scope.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}

const isTensor = (value: Tensor | ArrayLike<number>): value is Tensor => 'handle' in value;
