/**
 * What one more token takes, counted by the allocator: at fixed chunk, tile, loss-chunk and tier sizes the peaks of a training step grow as the formula says.
 * Prints the table of docs/measurements.md.
 */
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { attachLora, type CausalLM, loadModel, type TokenSequence, TrainingSession } from '@lc/models';
import { deviceMemory, resetPeak, Workspace } from '@lc/tensor';
import { expectNoLeaks, seededRandom } from '@lc/tensor/testing';
import { plan } from '@lc/vram-probe';
import { afterAll, describe, expect, it } from 'vitest';

expectNoLeaks();
const root = join(dirname(fileURLToPath(import.meta.url)), '..');
// On the CPU, attention's backward splits the keys into ranges with a dQ of the chunk each: one more per 512 keys, at most 8. From 4096 tokens on
// their number is fixed, like the chunk; before, a longer sequence takes them besides what the formula counts.
const lengths = [4096, 5120, 6144] as const;
const CHUNK = 512;
const TILE = 256;
const LOSS_CHUNK = 128;

interface Case {
  folder: string;
  ropeScaling?: Readonly<Record<string, unknown>>;
}
const cases: Record<string, Case> = {
  'tiny-gpt-oss': {
    folder: join(root, '../examples/quickstart/tiny-gpt-oss'),
    ropeScaling: {
      rope_type: 'yarn',
      factor: 12,
      beta_fast: 32,
      beta_slow: 1,
      original_max_position_embeddings: 512,
      truncate: false,
      rope_theta: 150000,
    },
  },
  llama: { folder: join(root, 'fixtures/reference-models/llama') },
  'qwen3-moe': { folder: join(root, 'fixtures/reference-models/qwen3-moe') },
};

function sequence(tokens: number, vocabSize: number): TokenSequence {
  const random = seededRandom(tokens);
  const inputIds = Int32Array.from({ length: tokens }, () => Math.floor(random() * vocabSize));
  // Documents of 512 tokens: what is allocated depends on the sequence alone, and attention across them all would take its time.
  return { inputIds, labels: inputIds.slice(), docStart: Int32Array.from({ length: tokens }, (_, i) => i - (i % 512)) };
}

/** Peaks of a step over what lay there before, and how much was allocated during it. A first step sizes the workspace: it grows by slabs, then becomes one. */
async function measure(model: CausalLM, tokens: number): Promise<{ device: number; host: number; later: number }> {
  const live = { device: deviceMemory('cpu').liveBytes, host: deviceMemory('host').liveBytes };
  using ws = new Workspace({ device: 'cpu', label: 'workspace' });
  using session = new TrainingSession({ model, tokens, chunk: CHUNK, lossChunk: LOSS_CHUNK, ws, storeOptions: { deviceBytes: 0 } });
  const data = sequence(tokens, model.config.vocabSize);
  await session.step(data);
  const allocations = (): number => deviceMemory('cpu').allocations + deviceMemory('host').allocations;
  const before = allocations();
  resetPeak();
  await session.step(data);
  return {
    device: deviceMemory('cpu').peakBytes - live.device,
    host: deviceMemory('host').peakBytes - live.host,
    later: allocations() - before,
  };
}

const rows: string[] = [];
afterAll(() => {
  const head = [
    `Bytes counted by lc's allocator during one training step on the CPU (f32), LoRA r 8 on q, k, v, o; chunk ${CHUNK}, MLP tile ${TILE}, loss chunk ${LOSS_CHUNK}, all checkpoints on the host tier.`,
    '',
    `| model | ${lengths.map((n) => `peak at ${n}: device + host, KiB`).join(' | ')} | device, bytes per token: measured / formula | host: measured / formula |`,
    `|---|${lengths.map(() => '---:|').join('')}---:|---:|`,
  ];
  console.log([...head, ...rows].join('\n'));
});

describe.each(Object.entries(cases))('memory of a training step: %s', (name, { folder, ropeScaling }) => {
  it('grows per token as the formula says, and later steps allocate nothing', async () => {
    using model = await loadModel(folder, { tile: TILE, ...(ropeScaling ? { ropeScaling } : {}), maxSeqLength: lengths[2] });
    attachLora(model, { r: 8, targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] });
    const { hiddenSize, numKeyValueHeads, headDim, layers } = model.config;
    const kvWidth = numKeyValueHeads * headDim;
    // K and V in f32, dK and dV in f32, of one layer; dx of one layer in f32; ids, labels, document starts.
    const deviceFormula = 4 * kvWidth * 4 + hiddenSize * 4 + 12;
    const hostFormula = layers.length * hiddenSize * 4;
    const peaks: { device: number; host: number }[] = [];
    for (const tokens of lengths) {
      const { later, ...peak } = await measure(model, tokens);
      expect(later).toBe(0);
      peaks.push(peak);
    }
    const slope = (key: 'device' | 'host', i: number): number =>
      ((peaks[i + 1]?.[key] as number) - (peaks[i]?.[key] as number)) / ((lengths[i + 1] as number) - (lengths[i] as number));
    const kib = (bytes: number): string => (bytes / 1024).toFixed(0);
    const cells = peaks.map((p) => `${kib(p.device)} + ${kib(p.host)}`);
    rows.push(
      `| ${name} | ${cells.join(' | ')} | ${slope('device', 1).toFixed(1)} / ${deviceFormula} | ${slope('host', 1).toFixed(1)} / ${hostFormula} |`,
    );
    const shape = {
      ...{ numHiddenLayers: layers.length, hiddenSize, numKeyValueHeads, headDim, numAttentionHeads: model.config.numAttentionHeads },
      intermediateSize: model.config.moe?.intermediateSize ?? model.config.intermediateSize,
      ...{ numExperts: model.config.moe?.numExperts ?? 0, numExpertsPerTok: model.config.moe?.numExpertsPerTok ?? 0 },
      ...{ vocabSize: model.config.vocabSize, tieWordEmbeddings: model.config.tieWordEmbeddings },
    };
    const sizes = { chunk: CHUNK, tile: TILE, lossChunk: LOSS_CHUNK, checkpointDeviceBytes: 0 };
    expect(plan({ model: shape, tokens: lengths[2], ...sizes }).perToken).toMatchObject({
      device: deviceFormula,
      checkpoints: hostFormula,
    });
    for (let i = 0; i + 1 < lengths.length; i++) {
      expect(Math.abs(slope('device', i) / deviceFormula - 1)).toBeLessThan(0.03);
      expect(Math.abs(slope('host', i) / hostFormula - 1)).toBeLessThan(0.03);
    }
  });
});
