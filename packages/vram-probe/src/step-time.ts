/** How much longer a step takes with one plan than with another: what sizes, segments and kept outputs change of it. For comparing plans, not a promise of seconds. */
import type { ModelShape } from './shape.js';

/**
 * FLOP/s of matrix products and of attention's forward as measured on an H100 and on one core pair of the test machine; only their ratio matters here. `rows`: a product over so many
 * rows of an expert (of a dense MLP) takes as long to read its weights as to compute. Of gpt-oss-20b's MLP on an H100 tiles of 4,096 tokens took 1.16 of the time of 32,768, 8,192 took
 * 1.06, 2,048 about 1.25 of 16,384; on the CPU 256 tokens of 4 experts of 16 took 1.4 of 4,096. `chunk`: tokens whose linears take as long as what a chunk costs beside them (launches, the
 * ends of kernels): four layers of gpt-oss-20b at 32,768 tokens took 607 ms in chunks of 8,192 and 602 in chunks of 16,384.
 */
const RATES = {
  cuda: { gemm: 600e12, attention: 500e12, rows: 80, chunk: 320 },
  cpu: { gemm: 200e9, attention: 180e9, rows: 25, chunk: 8 },
} as const;

export interface Choices {
  tokens: number;
  chunk: number;
  tile: number;
  layersPerSegment: number;
  keep: { layers: number; tokens: number };
}

/** Share of the pairs of query and key that the last `kept` queries of a causal sequence see. */
export const pairsOfLast = (tokens: number, kept: number): number => 1 - (1 - Math.min(1, kept / tokens)) ** 2;

/** Seconds of the linears, and of attention's forward where backward runs it again: windowed layers' is counted as nothing, a sequence as one document. */
export function comparableSeconds(m: ModelShape, device: 'cpu' | 'cuda', c: Choices): number {
  const rate = RATES[device];
  const [layers, full] = [m.numHiddenLayers, m.fullAttentionLayers ?? m.numHiddenLayers];
  const q = m.numAttentionHeads * m.headDim;
  const projections = 2 * m.hiddenSize * (2 * q + 2 * m.numKeyValueHeads * m.headDim);
  const experts = m.numExperts > 0 ? m.numExpertsPerTok : 1;
  const mlp = 2 * 3 * m.hiddenSize * m.intermediateSize * experts;
  const perRow = m.numExperts > 0 ? m.numExperts / m.numExpertsPerTok : 1; // tokens of a tile for one row of each expert
  const perChunk = rate.chunk / Math.min(c.chunk, c.tokens);
  const perTile = (rate.rows * perRow) / Math.min(c.tile, c.chunk, c.tokens);
  const linears = (c.tokens * (projections * (1 + perChunk) + mlp * (1 + perChunk + perTile))) / rate.gemm;
  // Inside a segment layers run forward a second time; of the last segment the inputs still lie there.
  const again = (Math.ceil(layers / c.layersPerSegment) - 1) * (c.layersPerSegment - 1);
  const attention = (2 * q * c.tokens ** 2) / rate.attention;
  const notKept = full - c.keep.layers * pairsOfLast(c.tokens, c.keep.tokens);
  // Which of the layers that run again have no window is not known here: as many as elsewhere.
  return linears * (3 * layers + again) + attention * notKept * (1 + again / layers);
}
