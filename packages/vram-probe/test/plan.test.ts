import { planStore } from '@lc/offload-ckpt';
import { seededRandom } from '@lc/tensor/testing';
import { describe, expect, it } from 'vitest';
import { modelShapeFromConfig, type PlanOptions, plan } from '../src/index.js';
import { comparableSeconds, pairsOfLast } from '../src/step-time.js';
import { storeBytes } from '../src/store-bytes.js';

const gptOss20b = modelShapeFromConfig({
  num_hidden_layers: 24,
  hidden_size: 2880,
  num_attention_heads: 64,
  num_key_value_heads: 8,
  head_dim: 64,
  intermediate_size: 2880,
  num_local_experts: 32,
  num_experts_per_tok: 4,
  vocab_size: 201088,
});
const GiB = 2 ** 30;
const cuda = (tokens: number, more: Partial<PlanOptions> = {}) =>
  plan({ model: gptOss20b, tokens, device: 'cuda', vramBudget: 80 * GiB, ramBudget: 120 * GiB, ...more });
/** A CPU with room for anything. */
const big = { vramBudget: 4096 * GiB, ramBudget: 4096 * GiB };

describe('plan', () => {
  it('gpt-oss-20b: bytes per token are what the schedule stores', () => {
    const p = cuda(131_072);
    expect(p.perToken.device).toBe(6144 + 5760 + 12); // K, V bf16 and dK, dV f32 of one layer; dx; ids, labels, documents
    expect(p.perToken.checkpoints).toBe(138_240);
    expect(p.fits).toBe(true);
  });

  it('device bytes grow by exactly that, with tiers and sizes fixed', () => {
    const at = (tokens: number) => cuda(tokens, { chunk: 4096, lossChunk: 512, checkpointDeviceBytes: 0 });
    const [a, b] = [at(65_536), at(131_072)];
    expect((b.predictedPeak.device - a.predictedPeak.device) / 65_536).toBe(a.perToken.device);
    expect((b.predictedPeak.host - a.predictedPeak.host) / 65_536).toBe(138_240);
  });

  it('half a million tokens fit 24 GiB of VRAM, with the checkpoints in RAM', () => {
    const p = cuda(530_000, { vramBudget: 24 * GiB });
    expect(p.fits).toBe(true);
    expect(p.predictedPeak.device).toBeLessThan(24 * GiB);
    expect((p.checkpoints.hostBytes + p.checkpoints.deviceBytes) / 1e9).toBeCloseTo(73.27, 1);
  });

  it('keeps the checkpoints on the device while there is room', () => {
    expect(cuda(32_768).checkpoints.hostBytes).toBe(0);
    expect(cuda(530_000).checkpoints.deviceBytes).toBeGreaterThan(0);
  });

  it('names the budget that is exceeded, and the longest length that fits', () => {
    const p = cuda(2_000_000);
    expect(p.fits).toBe(false);
    expect(p.reasons.join()).toMatch(/RAM: .* of gradient checkpoints, 120\.00 GiB to be had/);
    expect(p.maxTokens).toBeGreaterThan(900_000);
    expect(cuda(p.maxTokens).fits).toBe(true);
    expect(cuda(Math.ceil(p.maxTokens * 1.01)).fits).toBe(false);
    expect(cuda(1000, { vramBudget: GiB })).toMatchObject({ fits: false, maxTokens: 0 });
  });

  it('a checkpoint every second layer halves the host bytes', () => {
    const one = cuda(530_000, { vramBudget: 24 * GiB, checkpointDeviceBytes: 0 });
    const two = cuda(530_000, { vramBudget: 30 * GiB, checkpointDeviceBytes: 0, layersPerSegment: 2 });
    expect(two.predictedPeak.host).toBe(one.predictedPeak.host / 2);
  });

  it('plans for the CPU from what is free now', () => {
    const p = plan({ model: { ...gptOss20b, numHiddenLayers: 1, numExperts: 2, vocabSize: 1000 }, tokens: 2048 });
    expect([p.fits, p.chunk]).toEqual([true, 1024]);
    expect(p.maxTokens).toBeGreaterThan(2048);
  });

  it.each([{ tokens: 0 }, { tokens: 1.5 }, { chunk: 0 }, { vramBudget: Number.NaN }, { layersPerSegment: -1 }])('refuses %j', (bad) => {
    expect(() => cuda(1000, bad)).toThrow(expect.objectContaining({ code: 'ERR_LC_ARGUMENT' }));
  });
});

describe('what is kept, and the sizes that make a step fastest', () => {
  const model = { ...gptOss20b, fullAttentionLayers: 12 };
  /** An H100 with the weights loaded, in a machine with 128 GiB of RAM. */
  const h100 = (tokens: number, more: Partial<PlanOptions> = {}) =>
    cuda(tokens, {
      ...{ model, lora: { r: 8, dropout: 0 }, weightBytes: 0, adapterBytes: 0, optimizerBytes: 0, contextBytes: 192 << 20 },
      ...{ vramBudget: 65 * GiB, ramBudget: 112 * GiB, keep: 'auto' as const, maxTokens: false, ...more },
    });
  const seconds = (p: ReturnType<typeof h100>): number => comparableSeconds(model, 'cuda', { ...p, layersPerSegment: p.segment });

  it.each([131_072, 530_000, 800_000, 1_000_000, 1_048_576])('%i tokens fit an H100 and 112 GiB of RAM', (tokens) => {
    const p = h100(tokens);
    expect([p.fits, p.reasons]).toEqual([true, []]);
    expect(p.predictedPeak.device).toBeLessThanOrEqual(65 * GiB);
    expect(p.predictedPeak.host).toBeLessThanOrEqual(112 * GiB);
    expect(p.keep.deviceBytes + p.keep.hostBytes).toBe(p.keep.layers * p.keep.tokens * 8448);
    // One chunk more in every layer would not fit.
    const more = h100(tokens, { ...sizesOf(p), keep: { layers: 12, tokens: p.keep.tokens + p.chunk } });
    expect(more.fits).toBe(p.keep.tokens === tokens);
    // The last tokens of every layer save more than the whole of some layers.
    for (let layers = 1; layers <= 12; layers++) {
      const whole = h100(tokens, { ...sizesOf(p), keep: layers });
      if (whole.fits) expect(seconds(p)).toBeLessThanOrEqual(seconds(whole) * 1.0001);
    }
  });
  const sizesOf = (p: ReturnType<typeof h100>) => ({ chunk: p.chunk, tile: p.tile, lossChunk: p.lossChunk, layersPerSegment: p.segment });

  it('no other sizes and no other share of kept outputs would be clearly faster', () => {
    for (const [tokens, vram, ram] of [
      [1_000_000, 65, 112],
      [530_000, 11, 105],
      [131_072, 4.5, 40],
      [32_768, 3.5, 100],
    ] as const) {
      const budgets = { vramBudget: vram * GiB, ramBudget: ram * GiB };
      const p = h100(tokens, { ...budgets, layersPerSegment: 'auto' });
      expect(p.fits).toBe(true);
      for (const layersPerSegment of [1, 2, 3, 4])
        for (const chunk of [16384, 8192, 4096, 2048, 1024])
          for (const tile of [16384, 8192, 4096, 2048, 1024, 512])
            for (const keep of ['auto', 0, 3, 12] as const) {
              const other = h100(tokens, { ...budgets, layersPerSegment, chunk, tile: Math.min(tile, chunk), keep });
              if (other.fits) expect(seconds(other)).toBeGreaterThan(seconds(p) * 0.989);
            }
    }
  });

  it('a checkpoint for two layers makes room for outputs, where that is faster', () => {
    const [one, auto] = [h100(1_000_000), h100(1_000_000, { layersPerSegment: 'auto' })];
    expect(auto.segment).toBeGreaterThan(1);
    expect(seconds(auto)).toBeLessThan(seconds(one) / 2);
    expect(auto.keep.tokens).toBeGreaterThan(900_000);
    expect(h100(131_072, { layersPerSegment: 'auto' }).segment).toBe(1); // everything fits: nothing to gain
  });

  it('keeps whole chunks of what is asked for, and no more than there is', () => {
    const kept = (keep: PlanOptions['keep'], chunk = 16_384) => {
      const { layers, tokens } = h100(100_000, { keep, chunk }).keep;
      return [layers, tokens];
    };
    expect(kept({ layers: 3, tokens: 20_000 })).toEqual([3, 1696 + 16_384]); // the last chunk has 1,696 tokens
    expect(kept({ layers: 30, tokens: 200_000 })).toEqual([12, 100_000]);
    expect(kept({ layers: 3, tokens: 1000 })).toEqual([0, 0]);
    expect(kept(5)).toEqual([5, 100_000]);
    expect(kept('auto')).toEqual([12, 100_000]);
    expect(kept({ layers: 2, tokens: 100_000 }, 100_000)).toEqual([2, 100_000]); // one chunk
    const wrong = [
      { layers: 1.5, tokens: 2 },
      { layers: 1, tokens: Number.NaN },
      Number.NaN,
      -1,
      { layers: 3 },
      { tokens: 5 },
      'all',
      null,
    ];
    for (const keep of wrong as PlanOptions['keep'][])
      expect(() => kept(keep)).toThrow(
        expect.objectContaining({ code: 'ERR_LC_ARGUMENT', message: expect.stringMatching(/keep must be/) }),
      );
  });

  it('of one chunk, as many layers as fit', () => {
    const sizes = { chunk: 16_384, tile: 16_384, checkpointDeviceBytes: 0 };
    const { device, host } = h100(16_384, { ...sizes, keep: 0 }).predictedPeak;
    const layer = 16_384 * 8448;
    // Beside the rest the device has room for the slots that kept outputs pass through, the host for five layers and a half.
    const p = h100(16_384, { ...sizes, vramBudget: device + 4 * layer, ramBudget: host + 5.5 * layer });
    expect(p.keep).toEqual({ layers: 5, tokens: 16_384, deviceBytes: 0, hostBytes: 5 * layer });
    const room = h100(16_384, { ...sizes, vramBudget: device + 6.5 * layer, ramBudget: host + 5.5 * layer }); // two more on the device
    expect(room.keep).toEqual({ layers: 7, tokens: 16_384, deviceBytes: 2 * layer, hostBytes: 5 * layer });
  });

  it('the last half of the tokens sees three quarters of the pairs', () => {
    expect([0, 25, 50, 100].map((kept) => pairsOfLast(100, kept))).toEqual([0, 0.4375, 0.75, 1]);
  });
});

it('the closed form of the store is what the store plans', () => {
  const random = seededRandom(3);
  const pick = (most: number): number => 1 + Math.floor(random() * most);
  for (let i = 0; i < 2000; i++) {
    const shape = { layers: pick(9), tokens: pick(300), chunk: pick(100), width: pick(8), layersPerSegment: pick(4) };
    const all = Math.ceil(shape.layers / shape.layersPerSegment) * shape.tokens * shape.width * 4;
    const deviceBytes = [0, Number.POSITIVE_INFINITY, all, Math.floor(random() * all * 1.2), shape.tokens * shape.width * 4][
      i % 5
    ] as number;
    const o = { ...shape, dtype: i % 2 ? ('f32' as const) : ('bf16' as const), deviceBytes };
    expect({ o, bytes: storeBytes(o).bytes }).toEqual({ o, bytes: planStore(o).bytes });
  }
});

describe('what the bytes are made of', () => {
  it('LoRA: elements of A and B of every target', () => {
    // r 8 on q, k, v, o of gpt-oss-20b: 3,981,312 parameters
    const attention = cuda(4096, { lora: { r: 8 } });
    expect([attention.bytes.adapters, attention.bytes.gradients, attention.bytes.optimizer]).toEqual([8, 4, 8].map((b) => b * 3_981_312));
    expect(cuda(4096, { lora: { r: 8 }, optimBits: 8 }).bytes.optimizer).toBe(Math.ceil(2.04 * 3_981_312));
    const experts = cuda(4096, { lora: { r: 4, targets: ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'] } });
    expect(experts.bytes.adapters).toBe(8 * 24 * 4 * 32 * (2880 + 5760 + 2880 + 2880));
    expect(experts.bytes.chunkWork).toBeGreaterThan(attention.bytes.chunkWork);
    expect(cuda(4096, { trainableParameters: 1000 }).bytes.adapters).toBe(8000);
    const dense = { ...gptOss20b, numExperts: 0, numExpertsPerTok: 0 };
    expect(cuda(4096, { model: dense, lora: { r: 1, targets: ['gate_proj', 'down_proj'] } }).bytes.gradients).toBe(4 * 24 * 2 * 5760);
    expect(() => cuda(4096, { lora: { r: 8, targets: ['gate_proj'] } })).toThrow(
      /'gate_proj' is not in this model, which has q_proj.*experts\.down_proj/,
    );
    expect(() => cuda(4096, { lora: { r: 0 } })).toThrow(/lora\.r must be a whole number >= 1/);
  });

  it('weights: quantized, kept in the compute dtype, or converted layer by layer', () => {
    const layer = 2880 * (2 * 4096 + 2 * 512) + 3 * 32 * 2880 * 2880;
    const embeddings = 2 * 201_088 * 2880;
    const four = cuda(4096).bytes;
    expect([four.weights, four.dequantized, four.experts]).toEqual([
      2 * embeddings + Math.ceil(24 * layer * 0.54),
      2 * layer,
      2 * 3 * 32 * 2880 * 2880, // 1.59 GB
    ]);
    const plain = cuda(4096, { quantization: 'none' }).bytes;
    expect([plain.weights, plain.dequantized, plain.experts]).toEqual([2 * embeddings + 24 * layer * 2, 0, 0]);
    const bf16OnCpu = plan({ ...big, model: gptOss20b, tokens: 4096, quantization: 'none', dtypes: { weights: 'bf16' } }).bytes;
    expect([bf16OnCpu.weights, bf16OnCpu.dequantized]).toEqual([4 * embeddings + 24 * layer * 2, 4 * layer]);
  });

  it('per token on the CPU, in f32', () => {
    const p = plan({ ...big, model: gptOss20b, tokens: 8192 });
    expect(p.perToken).toEqual({ device: 4 * 512 * 4 + 2880 * 4 + 12, checkpoints: 24 * 2880 * 4, host: 0 });
    expect(plan({ ...big, model: gptOss20b, tokens: 8192, checkpointDeviceBytes: 0 }).perToken.host).toBe(24 * 2880 * 4);
  });

  it('segments: their recomputed inputs are counted', () => {
    const at = (tokens: number) => cuda(tokens, { chunk: 4096, lossChunk: 512, checkpointDeviceBytes: 0, layersPerSegment: 3 });
    const [a, b] = [at(65_536), at(131_072)];
    expect(a.segment).toBe(3);
    expect((b.predictedPeak.device - a.predictedPeak.device) / 65_536).toBe(a.perToken.device);
    expect((b.predictedPeak.host - a.predictedPeak.host) / 65_536).toBe(a.perToken.host);
    expect(a.perToken).toEqual({ device: 6144 + 3 * 5760 + 12, checkpoints: 8 * 5760, host: 8 * 5760 });
  });

  it('counts the scratch of the chunk that sees the most keys', () => {
    const model = { ...gptOss20b, numKeyValueHeads: 2, numExperts: 0, numExpertsPerTok: 0, intermediateSize: 64, vocabSize: 1000 };
    const work = (tokens: number) => plan({ ...big, model, tokens, chunk: 256, tile: 256 }).bytes.chunkWork;
    // Attention's backward on the CPU keeps a dQ for every 512 keys, 8 at most.
    expect(work(4096) - work(3072)).toBe(2 * 256 * 4096 * 4);
    expect(work(65_536)).toBe(work(4096));
  });

  it('says what would make it fit', () => {
    const tight = { vramBudget: 40 * GiB, ramBudget: 70 * GiB };
    const p = cuda(1_000_000, tight);
    expect(p.fits).toBe(false);
    expect(p.reasons.join()).toMatch(/RAM: .*it would fit with layersPerSegment: 2/);
    expect(cuda(1_000_000, { ...tight, layersPerSegment: 2 }).fits).toBe(true);
    expect(cuda(1000, { vramBudget: GiB }).reasons.join()).not.toMatch(/would fit/);
  });
});

describe('modelShapeFromConfig', () => {
  it('lists everything that is wrong', () => {
    expect(() => modelShapeFromConfig({ hidden_size: -1 })).toThrow(
      /hidden_size must be.*num_attention_heads is missing.*num_hidden_layers is missing/,
    );
    expect(() => modelShapeFromConfig(null)).toThrow(expect.objectContaining({ code: 'ERR_LC_CONFIG' }));
  });
});
