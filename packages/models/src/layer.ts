import { attentionBackward, attentionForward, type RopeTable, ropeBackward, ropeForward } from '@lc/attention';
import {
  add,
  type Block,
  copy,
  type DType,
  dtypeBytes,
  type Kept,
  type Layer,
  type LayerState,
  LcTypeError,
  type Linear,
  type Parameter,
  type Pass,
  rmsNorm,
  rmsNormBackward,
  type Span,
  type Tensor,
  type Workspace,
} from '@lc/tensor';

/** The attention half of a decoder layer: everything but the MLP. */
export interface AttentionParts {
  q: Linear;
  k: Linear;
  v: Linear;
  o: Linear;
  /** [hidden] */
  readonly inputNorm: Tensor;
  /** Qwen3: [headDim], else null. */
  readonly qNorm: Tensor | null;
  readonly kNorm: Tensor | null;
  /** gpt-oss: [heads], else null. */
  readonly sinks: Tensor | null;
}

/** Dimensions and parts of a layer. The layer owns none of the tensors. */
export interface DecoderLayerOptions {
  readonly hiddenSize: number;
  readonly numAttentionHeads: number;
  readonly numKeyValueHeads: number;
  readonly headDim: number;
  readonly rmsNormEps: number;
  /** Keys a query sees, itself included; null: all earlier ones of its document. */
  readonly window: number | null;
  readonly attention: AttentionParts;
  /** Norm and residual included. */
  readonly mlp: Block;
  /** The rotation in force; asked for at every call, since dynamic RoPE depends on the length of the sequence. */
  readonly rope: () => RopeTable;
  /** Whether attention's gradients have the same bits every time (`attentionBackward`); may be changed later. Default true. */
  readonly deterministic?: boolean;
}

/** K, V [tokens, kvHeads, headDim] in the workspace's dtype; dK, dV f32 of the same shape in a backward pass. */
export interface DecoderLayerState extends LayerState {
  readonly k: Tensor;
  readonly v: Tensor;
  readonly dk: Tensor | null;
  readonly dv: Tensor | null;
}

/**
 * A pre-norm decoder layer: h = x + o(attention(rope(q, k), v)) of norm(x), out = mlp(h) with its own norm and residual. It runs on one chunk of tokens,
 * given K and V of the chunks before it, and its backward on one chunk, given x and d(out): nothing else is kept between the two.
 */
export class DecoderLayer implements Layer {
  readonly scale: number;
  /** As in `attentionBackward`. */
  deterministic: boolean;
  private mlpBlock: Block;

  constructor(readonly options: DecoderLayerOptions) {
    this.scale = 1 / Math.sqrt(options.headDim);
    this.deterministic = options.deterministic ?? true;
    this.mlpBlock = options.mlp;
  }

  /** Norm, linears and sinks of the attention half. */
  get attention(): AttentionParts {
    return this.options.attention;
  }
  /** Replaceable: `attachLora` puts a block over LoRA linears here. */
  get mlp(): Block {
    return this.mlpBlock;
  }
  /** A block that takes the place of the one that was there. */
  set mlp(block: Block) {
    this.mlpBlock = block;
  }

  /** What is trained in this layer. */
  get parameters(): readonly Parameter[] {
    return [...this.linears().flatMap((linear) => linear.parameters), ...this.mlpBlock.parameters];
  }

  /** The attention output and its log-sum-exp; whole 16 bytes, so that every chunk's rows are aligned. Nothing where a window makes them cheap. */
  keepBytes(dtype: DType): number {
    const { numAttentionHeads: heads, headDim, window } = this.options;
    return window === null ? Math.ceil((heads * (headDim * dtypeBytes[dtype] + 4)) / 16) * 16 : 0;
  }

  open(tokens: number, pass: Pass, ws: Workspace): DecoderLayerState {
    const { numKeyValueHeads, headDim } = this.options;
    const shape = [tokens, numKeyValueHeads, headDim];
    const backward = pass === 'backward';
    const state = {
      tokens,
      k: ws.alloc(shape),
      v: ws.alloc(shape),
      dk: backward ? ws.zeros(shape, 'f32') : null,
      dv: backward ? ws.zeros(shape, 'f32') : null,
    };
    for (const linear of this.linears()) linear.open(pass, ws);
    this.mlpBlock.open(pass, ws);
    return state;
  }

  /** Lets go of dequantized weights; K and V go with the workspace. */
  close(_state: LayerState): void {
    for (const linear of this.linears()) linear.close();
    this.mlpBlock.close();
  }

  forward(x: Tensor, out: Tensor, at: Span, state: LayerState, ws: Workspace, kept: Kept | null = null): void {
    const s = this.stateOf(state, at);
    ws.scoped(() => {
      const { n, attn, lse } = this.shapes(at, ws, kept);
      const h = ws.alloc([n, this.options.hiddenSize]);
      ws.scoped(() => {
        const normed = this.normed(x, at, ws);
        this.keysAndValues(normed, at, s, ws);
        if (!kept?.filled) this.attend(this.queries(normed, at, ws, null), attn, lse, at, s, ws);
      });
      this.attention.o.forward(attn, h, at, ws);
      add({ a: h, b: x, out: h });
      this.mlpBlock.forward(h, out, at, ws);
    });
  }

  fill(x: Tensor, at: Span, state: LayerState, ws: Workspace): void {
    const s = this.stateOf(state, at);
    ws.scoped(() => this.keysAndValues(this.normed(x, at, ws), at, s, ws));
  }

  backward(x: Tensor, dout: Tensor, dx: Tensor, at: Span, state: LayerState, ws: Workspace, kept: Kept | null = null): void {
    const s = this.stateOf(state, at);
    const { dk: dkAll, dv: dvAll } = s;
    if (!dkAll || !dvAll)
      throw new LcTypeError('ERR_LC_ARGUMENT', "DecoderLayer.backward: the state was opened for 'forward'; open it with pass 'backward'");
    const { hiddenSize, numAttentionHeads: heads, numKeyValueHeads: kvHeads, headDim, rmsNormEps: eps, rope } = this.options;
    const { q: qProj, k: kProj, v: vProj, o: oProj, inputNorm, qNorm, kNorm, sinks } = this.attention;
    ws.scoped(() => {
      const { n, attn, lse } = this.shapes(at, ws, kept);
      const normed = this.normed(x, at, ws);
      // With QK norm the backward needs q and k as they were before it. K after it lies in the state; the raw K is projected again.
      const qRaw = qNorm ? ws.alloc([n, heads, headDim]) : null;
      const q = this.queries(normed, at, ws, qRaw);
      if (!kept?.filled) this.attend(q, attn, lse, at, s, ws);
      ws.scoped(() => {
        const h = ws.alloc([n, hiddenSize]);
        oProj.forward(attn, h, at, ws);
        add({ a: h, b: x, out: h });
        this.mlpBlock.backward(h, dout, dx, at, ws); // dx = dh from here on; dout is not read again
      });
      const dAttn = ws.alloc([n, heads * headDim]);
      oProj.backward(attn, dx, dAttn, at, ws);
      const dq = ws.alloc([n, heads, headDim]);
      const end = at.start + n;
      attentionBackward({
        q,
        k: s.k.rows(0, end),
        v: s.v.rows(0, end),
        out: attn.view([n, heads, headDim]),
        dout: dAttn.view([n, heads, headDim]),
        lse,
        dq,
        dk: dkAll.rows(0, end),
        dv: dvAll.rows(0, end),
        start: at.start,
        docStart: at.docStart,
        window: this.options.window,
        sinks,
        scale: this.scale,
        deterministic: this.deterministic,
        ws,
      });
      // Chunks come right to left: no later query adds to this chunk's dK and dV any more.
      const dk = this.computed(dkAll.rows(at.start, n), ws);
      const dv = this.computed(dvAll.rows(at.start, n), ws);
      ropeBackward({ x: dq, start: at.start, docStart: at.docStart, rope: rope(), ws });
      ropeBackward({ x: dk, start: at.start, docStart: at.docStart, rope: rope(), ws });
      if (qNorm && qRaw) rmsNormBackward({ x: qRaw, weight: qNorm, dout: dq, dx: dq, eps });
      if (kNorm) {
        const kRaw = ws.alloc([n, kvHeads * headDim]);
        kProj.forward(normed, kRaw, at, ws);
        rmsNormBackward({ x: kRaw.view([n, kvHeads, headDim]), weight: kNorm, dout: dk, dx: dk, eps });
      }
      const dNormed = ws.alloc([n, hiddenSize]);
      qProj.backward(normed, dq.view([n, heads * headDim]), dNormed, at, ws);
      kProj.backward(normed, dk.view([n, kvHeads * headDim]), dNormed, at, ws, true);
      vProj.backward(normed, dv.view([n, kvHeads * headDim]), dNormed, at, ws, true);
      rmsNormBackward({ x, weight: inputNorm, dout: dNormed, dx, eps, accumulate: true });
    });
  }

  private linears(): Linear[] {
    const { q, k, v, o } = this.attention;
    return [q, k, v, o];
  }

  private stateOf(state: LayerState, at: Span): DecoderLayerState {
    if (at.start < 0 || at.length < 1 || at.start + at.length > state.tokens) {
      throw new LcTypeError(
        'ERR_LC_OUT_OF_BOUNDS',
        `DecoderLayer: tokens ${at.start}..${at.start + at.length} are outside the state's ${state.tokens}; open the layer for more tokens`,
      );
    }
    return state as DecoderLayerState;
  }

  /** attn [n, heads * headDim] and lse [n, heads]: where they are kept, else in the workspace. */
  private shapes(at: Span, ws: Workspace, kept: Kept | null): { n: number; attn: Tensor; lse: Tensor } {
    const { numAttentionHeads: heads, headDim } = this.options;
    const n = at.length;
    if (!kept) return { n, attn: ws.alloc([n, heads * headDim]), lse: ws.alloc([n, heads], 'f32') };
    const bytes = kept.data.view([kept.data.nbytes]);
    const attnBytes = n * heads * headDim * dtypeBytes[ws.dtype];
    return {
      n,
      attn: bytes.rows(0, attnBytes).reinterpret(ws.dtype, [n, heads * headDim]),
      lse: bytes.rows(attnBytes, 4 * n * heads).reinterpret('f32', [n, heads]),
    };
  }

  private normed(x: Tensor, at: Span, ws: Workspace): Tensor {
    const { hiddenSize, rmsNormEps: eps } = this.options;
    const out = ws.alloc([at.length, hiddenSize]);
    rmsNorm({ x, weight: this.attention.inputNorm, out, eps });
    return out;
  }

  /** q [n, heads, headDim], normed and rotated; its value before the norm into `raw`. */
  private queries(normed: Tensor, at: Span, ws: Workspace, raw: Tensor | null): Tensor {
    const { numAttentionHeads: heads, headDim, rmsNormEps: eps, rope } = this.options;
    const { q: proj, qNorm } = this.attention;
    const q = ws.alloc([at.length, heads, headDim]);
    const projected = raw ?? q;
    proj.forward(normed, projected.view([at.length, heads * headDim]), at, ws);
    if (qNorm) rmsNorm({ x: projected, weight: qNorm, out: q, eps });
    ropeForward({ x: q, start: at.start, docStart: at.docStart, rope: rope(), ws });
    return q;
  }

  /** Writes this span's K (normed and rotated) and V into the state. */
  private keysAndValues(normed: Tensor, at: Span, s: DecoderLayerState, ws: Workspace): void {
    const { numKeyValueHeads: kvHeads, headDim, rmsNormEps: eps, rope } = this.options;
    const { k: kProj, v: vProj, kNorm } = this.attention;
    const k = s.k.rows(at.start, at.length);
    kProj.forward(normed, k.view([at.length, kvHeads * headDim]), at, ws);
    if (kNorm) rmsNorm({ x: k, weight: kNorm, out: k, eps });
    ropeForward({ x: k, start: at.start, docStart: at.docStart, rope: rope(), ws });
    vProj.forward(normed, s.v.rows(at.start, at.length).view([at.length, kvHeads * headDim]), at, ws);
  }

  private attend(q: Tensor, attn: Tensor, lse: Tensor, at: Span, s: DecoderLayerState, ws: Workspace): void {
    const { numAttentionHeads: heads, headDim, window } = this.options;
    const end = at.start + at.length;
    attentionForward({
      q,
      k: s.k.rows(0, end),
      v: s.v.rows(0, end),
      out: attn.view([at.length, heads, headDim]),
      lse,
      start: at.start,
      docStart: at.docStart,
      window,
      sinks: this.attention.sinks,
      scale: this.scale,
      ws,
    });
  }

  /** An f32 gradient in the workspace's dtype: as it lies where that is f32. */
  private computed(t: Tensor, ws: Workspace): Tensor {
    if (ws.dtype === 'f32') return t;
    const out = ws.alloc(t.shape);
    copy(out, t);
    return out;
  }
}
