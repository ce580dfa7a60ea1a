import { add, LcTypeError, type Linear, type Span, type Tensor, type Workspace } from '@lc/tensor';
import { activationCode, native } from './native.js';
import { requireFeatures } from './plan.js';
import { TiledBlock, type TiledBlockOptions } from './tiled-block.js';

/** As Hugging Face's `hidden_act`: silu (SwiGLU), gelu (exact, by erf), gelu_pytorch_tanh. */
export type HiddenAct = 'silu' | 'gelu' | 'gelu_pytorch_tanh';

/** Linears and activation of a dense MLP. It owns none of them. */
export interface TiledMLPOptions extends TiledBlockOptions {
  /** hidden -> intermediate. */
  gateProj: Linear;
  /** hidden -> intermediate. */
  upProj: Linear;
  /** intermediate -> hidden. */
  downProj: Linear;
  activation: HiddenAct;
}

/**
 * The gated MLP of Llama, Mistral, Qwen, Gemma: down(act(gate(h)) * up(h)) with h = norm(x) (Shazeer, GLU Variants Improve Transformer, 2020), one tile of
 * tokens at a time. Extra memory is that of a tile: 3 intermediate + 1 hidden values per token forward, 4 and 2 backward. Backward recomputes gate and up of a tile, not
 * down: nothing needs its output.
 */
export class TiledMLP extends TiledBlock {
  readonly intermediateSize: number;
  private readonly activation: number;
  private readonly gateProj: Linear;
  private readonly upProj: Linear;
  private readonly downProj: Linear;

  /** @throws LcTypeError ERR_LC_SHAPE, ERR_LC_ARGUMENT */
  constructor(options: TiledMLPOptions) {
    const { gateProj, upProj, downProj, activation } = options;
    super('TiledMLP', gateProj.inFeatures, [gateProj, upProj, downProj], options);
    this.intermediateSize = gateProj.outFeatures;
    requireFeatures(this.op, 'upProj', upProj, this.hiddenSize, this.intermediateSize);
    requireFeatures(this.op, 'downProj', downProj, this.intermediateSize, this.hiddenSize);
    if (!Object.hasOwn(activationCode, activation) || (activation as string) === 'gptOss') {
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `TiledMLP: activation must be 'silu', 'gelu' or 'gelu_pytorch_tanh', got ${JSON.stringify(activation)}`,
      );
    }
    this.activation = activationCode[activation];
    this.gateProj = gateProj;
    this.upProj = upProj;
    this.downProj = downProj;
  }

  protected override tileForward(h: Tensor, base: Tensor | null, out: Tensor, at: Span, ws: Workspace): void {
    const { gate, up, act } = this.activate(h, at, ws);
    native().glu({ gate, up, out: act, activation: this.activation });
    this.downProj.forward(act, out, at, ws);
    if (base) add({ a: base, b: out, out });
  }

  protected override tileBackward(h: Tensor, dout: Tensor, dh: Tensor, at: Span, ws: Workspace): void {
    const { gate, up, act } = this.activate(h, at, ws);
    native().glu({ gate, up, out: act, activation: this.activation });
    const dact = ws.alloc(act.shape);
    this.downProj.backward(act, dout, dact, at, ws);
    native().gluBackward({ gate, up, dout: dact, activation: this.activation });
    this.gateProj.backward(h, gate, dh, at, ws);
    this.upProj.backward(h, up, dh, at, ws, true);
  }

  private activate(h: Tensor, at: Span, ws: Workspace): { gate: Tensor; up: Tensor; act: Tensor } {
    const make = (): Tensor => ws.alloc([at.length, this.intermediateSize]);
    const [gate, up, act] = [make(), make(), make()];
    this.gateProj.forward(h, gate, at, ws);
    this.upProj.forward(h, up, at, ws);
    return { gate, up, act };
  }
}
