import {
  add,
  type Block,
  copy,
  type ExpertLinear,
  type Linear,
  type Parameter,
  type Pass,
  rmsNorm,
  rmsNormBackward,
  type Span,
  type Tensor,
  type Workspace,
} from '@lc/tensor';
import { DEFAULT_TILE, requireActivations, requireCount, requireFinite, requireShape, sameMemory, tilesOf } from './plan.js';

/** What both MLPs take. */
export interface TiledBlockOptions {
  /** Tokens per tile. Default 1024. */
  tile?: number | undefined;
  /** RMSNorm before the MLP: weight [hidden]. Default: none. */
  norm?: { weight: Tensor; eps: number } | null | undefined;
  /** out = x + mlp(norm(x)). Default: true when `norm` is given. */
  residual?: boolean | undefined;
}

/** What dense and mixture-of-experts MLPs share: norm, residual, tiles, and opening their linears once per pass. */
export abstract class TiledBlock implements Block {
  private tileTokens: number;
  private readonly norm: { weight: Tensor; eps: number } | null;
  private readonly residual: boolean;
  private opened = false;

  protected constructor(
    protected readonly op: string,
    readonly hiddenSize: number,
    private readonly linears: readonly (Linear | ExpertLinear)[],
    options: TiledBlockOptions,
  ) {
    this.tileTokens = options.tile ?? DEFAULT_TILE;
    this.norm = options.norm ?? null;
    this.residual = options.residual ?? this.norm !== null;
    requireCount(op, 'tile', this.tileTokens);
    if (this.norm) {
      requireShape(op, 'norm.weight', this.norm.weight, [hiddenSize]);
      requireFinite(op, 'norm.eps', this.norm.eps, 0);
    }
  }

  /** Tokens per tile. Set it between steps, not inside one: recomputation must cut as the forward did. @throws ERR_LC_ARGUMENT */
  get tile(): number {
    return this.tileTokens;
  }
  /** Takes effect with the next call. @throws ERR_LC_ARGUMENT */
  set tile(tokens: number) {
    requireCount(this.op, 'tile', tokens);
    this.tileTokens = tokens;
  }

  /** h -> out (+ base where given), one tile. */
  protected abstract tileForward(h: Tensor, base: Tensor | null, out: Tensor, at: Span, ws: Workspace): void;
  /** h, dout -> dh, one tile. Reads dout only before it writes dh: the two may be the same memory. */
  protected abstract tileBackward(h: Tensor, dout: Tensor, dh: Tensor, at: Span, ws: Workspace): void;

  /** Those of the linears. */
  get parameters(): readonly Parameter[] {
    return this.linears.flatMap((linear) => linear.parameters);
  }

  open(pass: Pass, ws: Workspace): void {
    for (const linear of this.linears) linear.open(pass, ws);
    this.opened = true;
  }
  close(): void {
    for (const linear of this.linears) linear.close();
    this.opened = false;
  }

  /** x, out: [tokens, hidden], apart. @throws ERR_LC_SHAPE */
  forward(x: Tensor, out: Tensor, at: Span, ws: Workspace): void {
    requireActivations(`${this.op}.forward`, this.hiddenSize, at, { x, out });
    this.prepared('forward', ws, () => {
      for (const { first, at: tile } of tilesOf(at, this.tile)) {
        ws.scoped(() => {
          const xt = x.rows(first, tile.length);
          this.tileForward(this.normed(xt, ws), this.residual ? xt : null, out.rows(first, tile.length), tile, ws);
        });
      }
    });
  }

  /** Recomputes and back-propagates tile by tile. dx may be dout. Adds to the parameters' gradients. @throws ERR_LC_SHAPE */
  backward(x: Tensor, dout: Tensor, dx: Tensor, at: Span, ws: Workspace): void {
    requireActivations(`${this.op}.backward`, this.hiddenSize, at, { x, dout, dx });
    const { norm, residual } = this;
    this.prepared('backward', ws, () => {
      for (const { first, at: tile } of tilesOf(at, this.tile)) {
        ws.scoped(() => {
          const part = (t: Tensor): Tensor => t.rows(first, tile.length);
          const [xt, doutT, dxT] = [part(x), part(dout), part(dx)];
          const h = this.normed(xt, ws);
          const dh = norm || residual ? ws.alloc(h.shape) : dxT;
          this.tileBackward(h, doutT, dh, tile, ws);
          if (norm) {
            if (residual && !sameMemory(dxT, doutT)) copy(dxT, doutT);
            rmsNormBackward({ x: xt, weight: norm.weight, dout: dh, dx: dxT, eps: norm.eps, accumulate: residual });
          } else if (residual) add({ a: doutT, b: dh, out: dxT });
        });
      }
    });
  }

  private normed(x: Tensor, ws: Workspace): Tensor {
    if (!this.norm) return x;
    const h = ws.alloc(x.shape);
    rmsNorm({ x, weight: this.norm.weight, out: h, eps: this.norm.eps });
    return h;
  }

  /** Without `open`, linears are opened for this call: once, not once per tile. */
  private prepared(pass: Pass, ws: Workspace, work: () => void): void {
    if (this.opened) {
      work();
      return;
    }
    const mark = ws.mark();
    try {
      this.open(pass, ws);
      work();
    } finally {
      this.close();
      ws.reset(mark);
    }
  }
}
