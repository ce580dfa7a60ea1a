import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { joinDocuments, PackedDataset, type PackedSequence } from '@lc/data';
import { deviceMemory, setRamLimit } from '@lc/tensor';
import { expectNoLeaks, seededRandom } from '@lc/tensor/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { writeFolderAtomic } from '../src/files.js';
import {
  FastLanguageModel,
  type LanguageModel,
  type PeftOptions,
  type SFTConfig,
  SFTTrainer,
  type StepEvent,
  type TrainDataset,
  type TrainerEvent,
} from '../src/index.js';

expectNoLeaks();
const tiny = join(dirname(fileURLToPath(import.meta.url)), '../../../examples/quickstart/tiny-gpt-oss');
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-trainer-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

const document = (length: number, seed: number) => {
  const random = seededRandom(seed);
  const inputIds = Int32Array.from({ length }, () => 10 + Math.floor(random() * 200));
  return { inputIds, labels: inputIds.slice(), source: `${seed}` };
};
const dataset = (documents = 24, length = 40, maxLength = 80): PackedDataset =>
  new PackedDataset(
    Array.from({ length: documents }, (_, i) => document(length - (i % 5), i)),
    { maxLength, packing: true, shuffle: true, seed: 5, excessLengthStrategy: 'raise' },
  );
/** Always the same sequences. */
const fixed = (sequences: PackedSequence[]): TrainDataset => {
  let at = 0;
  return {
    next: () => sequences[at++ % sequences.length] as PackedSequence,
    length: () => sequences.length,
    state: () => at,
    restore: (s) => {
      at = s as number;
    },
  };
};

async function withModel<T>(fn: (model: LanguageModel) => Promise<T>, peft: PeftOptions = {}): Promise<T> {
  const { model } = await FastLanguageModel.fromPretrained(tiny, { maxSeqLength: 128, loadIn4bit: true, tile: 32 });
  using m = FastLanguageModel.getPeftModel(model, { r: 4, loraAlpha: 8, targetModules: ['q_proj', 'v_proj', 'o_proj'], ...peft });
  return await fn(m);
}
const args = (name: string, more: Partial<SFTConfig> = {}): SFTConfig => ({
  outputDir: join(dir, name),
  maxSteps: 4,
  learningRate: 1e-2,
  lrSchedulerType: 'constant',
  chunk: 32,
  lossChunk: 16,
  maxSeqLength: 80,
  seed: 1,
  ...more,
});
const parameters = (model: LanguageModel): number[] => model.parameters.flatMap((p) => [...p.value.data()]);
const failure = async (promise: Promise<unknown>): Promise<{ code: string; message: string }> => {
  try {
    await promise;
  } catch (error) {
    return error as { code: string; message: string };
  }
  throw new Error('expected a failure');
};

describe('SFTTrainer', () => {
  it('learns, writes a PEFT adapter, and tells what it does', async () => {
    const events: TrainerEvent[] = [];
    await withModel(async (model) => {
      const data = dataset(4, 40);
      using trainer = new SFTTrainer({
        model,
        trainDataset: data,
        evalDataset: data,
        args: args('learns', { maxSteps: 8 }),
        onEvent: (e) => events.push(e),
      });
      const before = await trainer.evaluate();
      const result = await trainer.train();
      const after = await trainer.evaluate();
      expect(result).toMatchObject({ reason: 'finished', globalStep: 8 });
      expect(after.loss).toBeLessThan(before.loss - 0.2);
    });
    const folder = join(dir, 'learns');
    expect(existsSync(join(folder, 'adapter_model.safetensors'))).toBe(true);
    expect(JSON.parse(readFileSync(join(folder, 'adapter_config.json'), 'utf8'))).toMatchObject({
      peft_type: 'LORA',
      r: 4,
      lora_alpha: 8,
      target_modules: ['q_proj', 'v_proj', 'o_proj'],
    });
    expect(new Set(events.map((e) => e.type))).toEqual(new Set(['plan', 'progress', 'step', 'eval', 'end']));
    const steps = events.filter((e): e is StepEvent => e.type === 'step');
    expect(steps).toHaveLength(8);
    for (const s of steps) expect(s.supervisedShare).toBeGreaterThan(0.9);
    const lines = readFileSync(join(folder, 'metrics.jsonl'), 'utf8').trim().split('\n');
    expect(lines.map((line) => (JSON.parse(line) as { type: string }).type)).toContain('step');
    // What was trained is what is loaded.
    const { model: loaded, tokenizer } = await FastLanguageModel.fromPretrained(tiny, { maxSeqLength: 128, tile: 32, adapter: folder });
    using _ = loaded;
    expect(await loaded.generateText(tokenizer, 'The state', { maxNewTokens: 3 })).toBeTypeOf('string');
  });

  it('makes its plan again for a longer sequence and for smaller limits, and goes on as if nothing had happened', async () => {
    const run = async (name: string, again: boolean) =>
      withModel(async (model) => {
        const sequences = [40, 40, 90, 40].map((length, i) => joinDocuments([document(length, i + 70)]));
        const reasons: (string | undefined)[] = [];
        using trainer = new SFTTrainer({
          model,
          trainDataset: fixed(sequences),
          args: args(name, { maxSeqLength: again ? 48 : 96 }),
          onEvent: (event) => {
            if (event.type === 'plan') reasons.push(event.reason);
            if (again && event.type === 'step' && event.step === 3) {
              const live = deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes;
              trainer.setLimits({ ramLimit: live - (trainer.plan().predictedHostBytes + 1000) }); // less than what is held
            }
          },
        });
        const { losses } = await trainer.train();
        return { losses, parameters: parameters(model), reasons };
      });
    try {
      const plain = await run('one-plan', false);
      const planned = await run('plans', true);
      expect(plain.reasons).toEqual([undefined]);
      expect(planned.reasons).toEqual([undefined, 'a sequence of 90 tokens', expect.stringMatching(/^ramLimit none -> \d+$/)]);
      expect(planned.losses.slice(0, 3)).toEqual(plain.losses.slice(0, 3)); // the same sizes: the same bits
      for (const [i, loss] of planned.losses.entries()) expect(loss).toBeCloseTo(plain.losses[i] as number, 4);
    } finally {
      setRamLimit(null);
    }
  });

  it('accumulation, batch and packing give the same step: the loss divides by all supervised tokens', async () => {
    // Four documents of different lengths, one partly masked.
    const documents = [20, 33, 11, 27].map((length, i) => document(length, i + 50));
    documents[1]?.labels.fill(-100, 0, 20);
    const single = documents.map((d) => joinDocuments([d]));
    const run = async (name: string, sequences: PackedSequence[], more: Partial<SFTConfig>) =>
      withModel(async (model) => {
        using trainer = new SFTTrainer({
          model,
          trainDataset: fixed(sequences),
          args: args(name, { maxSteps: 1, maxSeqLength: 128, ...more }),
        });
        const { losses } = await trainer.train();
        return { loss: losses[0] as number, parameters: parameters(model) };
      });
    const accumulated = await run('ga4', single, { gradientAccumulationSteps: 4 });
    const batched = await run('bs4', single, { perDeviceTrainBatchSize: 4 });
    const packed = await run('packed', [joinDocuments(documents)], {});
    expect(batched).toEqual(accumulated);
    expect(packed.loss).toBeCloseTo(accumulated.loss, 5);
    const largest = Math.max(...accumulated.parameters.map(Math.abs));
    const worst = Math.max(...packed.parameters.map((v, i) => Math.abs(v - (accumulated.parameters[i] as number))));
    // AdamW's first step is lr * sign(g) where |g| >> eps: equal gradients up to rounding give equal parameters.
    expect(worst / largest).toBeLessThan(1e-3);
  });

  it.each(['adamw_torch', 'adamw_8bit'] as const)(
    'stopping at a step and resuming gives the same bits as not stopping (%s)',
    async (optim) => {
      const more: Partial<SFTConfig> = {
        optim,
        maxSteps: 6,
        saveSteps: 2,
        saveTotalLimit: 2,
        gradientAccumulationSteps: 2,
        lrSchedulerType: 'cosine',
        warmupSteps: 2,
      };
      const peft = { loraDropout: 0.1, r: 16 };
      const whole = await withModel(async (model) => {
        using trainer = new SFTTrainer({ model, trainDataset: dataset(), args: args(`whole-${optim}`, more) });
        const { losses } = await trainer.train();
        return { losses, parameters: parameters(model) };
      }, peft);
      const folder = join(dir, `resumed-${optim}`);
      await withModel(async (model) => {
        const abort = new AbortController();
        using trainer = new SFTTrainer({
          model,
          trainDataset: dataset(),
          args: args(`resumed-${optim}`, more),
          // In the middle of step 4: its half-made gradients must not count.
          onEvent: (e) => e.type === 'progress' && e.step === 4 && e.fraction > 0.6 && abort.abort(),
        });
        expect(await trainer.train({ signal: abort.signal })).toMatchObject({ reason: 'aborted', globalStep: 3 });
      }, peft);
      expect(
        readdirSync(folder)
          .filter((n) => n.startsWith('checkpoint'))
          .sort(),
      ).toEqual(['checkpoint-2', 'checkpoint-3']);
      const resumed = await withModel(async (model) => {
        using trainer = new SFTTrainer({ model, trainDataset: dataset(), args: args(`resumed-${optim}`, more) });
        const { losses } = await trainer.train({ resumeFrom: true });
        return { losses, parameters: parameters(model) };
      }, peft);
      expect(resumed).toEqual(whole);
    },
  );

  it('a step after the first makes no allocation, and the prediction is not exceeded', async () => {
    await withModel(async (model) => {
      const counts: number[] = [];
      let predicted = 0;
      let peak = 0;
      using trainer = new SFTTrainer({
        model,
        trainDataset: dataset(),
        args: args('steady', { maxSteps: 4, checkpointDeviceBytes: 0 }),
        onEvent: (e) => {
          if (e.type === 'plan') predicted = e.predictedDeviceBytes;
          if (e.type === 'step') {
            counts.push(deviceMemory('cpu').allocations + deviceMemory('host').allocations);
            peak = e.deviceBytes;
          }
        },
      });
      await trainer.train();
      expect(new Set(counts).size).toBe(1);
      expect(peak).toBeGreaterThan(0);
      expect(predicted).toBeGreaterThanOrEqual(peak);
    });
  });

  it('refuses what would go wrong in silence', async () => {
    await withModel(async (model) => {
      const masked = joinDocuments([{ ...document(20, 1), labels: new Int32Array(20).fill(-100) }]);
      using nothing = new SFTTrainer({ model, trainDataset: fixed([masked]), args: args('masked') });
      expect(await failure(nothing.train())).toMatchObject({
        code: 'ERR_LC_NOTHING_SUPERVISED',
        message: expect.stringMatching(/all 20 labels are ignored/),
      });
      expect(() => new SFTTrainer({ model, trainDataset: dataset(), args: { ...args('x'), lerningRate: 1 } as SFTConfig })).toThrow(
        expect.objectContaining({ code: 'ERR_LC_CONFIG', message: expect.stringContaining('lerningRate') }),
      );
      using big = new SFTTrainer({ model, trainDataset: dataset(), args: args('big', { maxSeqLength: 128, vramLimit: 1 << 20 }) });
      expect(await failure(big.train())).toMatchObject({ code: 'ERR_LC_PLAN', message: expect.stringMatching(/longest length that fits/) });
      expect(() => FastLanguageModel.getPeftModel(model, {})).toThrow(expect.objectContaining({ code: 'ERR_LC_ADAPTER' }));
      // An adapter that is cut off from the loss: the check must find it.
      const dead = model.parameters[0];
      if (!dead) throw new Error('no parameters');
      const { checkAdapterGradients } = await import('../src/gradients.js');
      for (const p of model.parameters) p.grad.data().fill(1);
      for (const p of model.parameters) if (p.name.includes('layers.2.self_attn.v_proj')) p.grad.data().fill(0);
      expect(() => checkAdapterGradients(model.parameters)).toThrow(/1 adapters got no gradient.*layers\.2\.self_attn\.v_proj/);
      for (const p of model.parameters) p.grad.data().fill(0);
    });
    const { model } = await FastLanguageModel.fromPretrained(tiny, { tile: 32 });
    using bare = model;
    expect(() => new SFTTrainer({ model: bare, trainDataset: dataset(), args: args('bare') })).toThrow(
      expect.objectContaining({ code: 'ERR_LC_ADAPTER' }),
    );
    expect(() => FastLanguageModel.getPeftModel(bare, { targetModules: ['query'] })).toThrow(
      expect.objectContaining({ code: 'ERR_LC_ADAPTER', message: expect.stringMatching(/'query' match nothing/) }),
    );
  });

  it('stops on NaN before the update and keeps what was learnt', async () => {
    await withModel(async (model) => {
      using trainer = new SFTTrainer({
        model,
        trainDataset: dataset(),
        args: args('nan', { maxSteps: 4, saveSteps: 1 }),
        onEvent: (e) => {
          const p = model.parameters[0];
          if (e.type === 'step' && e.step === 2 && p) p.value.data()[0] = Number.NaN;
        },
      });
      expect(await failure(trainer.train())).toMatchObject({ code: 'ERR_LC_NAN', message: expect.stringMatching(/step 3: loss NaN/) });
      expect(existsSync(join(dir, 'nan/checkpoint-1/COMPLETE'))).toBe(true);
    });
  });

  it('refuses a checkpoint that is incomplete, broken, or of other options', async () => {
    await withModel(async (model) => {
      const own = args('refuse', { maxSteps: 2, saveSteps: 1 });
      {
        using trainer = new SFTTrainer({ model, trainDataset: dataset(), args: own });
        await trainer.train();
      }
      const checkpoint = join(dir, 'refuse/checkpoint-1');
      const resume = async (folder: string, more: Partial<SFTConfig> = {}) => {
        using trainer = new SFTTrainer({ model, trainDataset: dataset(), args: { ...own, ...more } });
        return await failure(trainer.train({ resumeFrom: folder }));
      };
      expect(await resume(checkpoint, { learningRate: 1 })).toMatchObject({
        code: 'ERR_LC_CONFIG',
        message: expect.stringMatching(/other options/),
      });
      const copy = (name: string): string => {
        cpSync(checkpoint, join(dir, name), { recursive: true });
        return join(dir, name);
      };
      const incomplete = copy('incomplete');
      rmSync(join(incomplete, 'COMPLETE'));
      expect(await resume(incomplete)).toMatchObject({ code: 'ERR_LC_DATA', message: expect.stringMatching(/not a complete checkpoint/) });
      const garbled = copy('garbled');
      writeFileSync(join(garbled, 'trainer_state.json'), '{"schema": 1');
      expect((await resume(garbled)).code).toBe('ERR_LC_DATA');
      const truncated = copy('truncated');
      writeFileSync(join(truncated, 'optimizer.safetensors'), readFileSync(join(checkpoint, 'optimizer.safetensors')).subarray(0, 100));
      expect((await resume(truncated)).code).toBe('ERR_LC_SAFETENSORS');
    });
  });
});

describe('writeFolderAtomic', () => {
  it('leaves the old folder as it was when the new one cannot be written', async () => {
    const folder = join(dir, 'atomic');
    await writeFolderAtomic(folder, async (t) => writeFileSync(join(t, 'a'), 'old'));
    await expect(
      writeFolderAtomic(folder, async (t) => {
        writeFileSync(join(t, 'a'), 'new');
        throw Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' });
      }),
    ).rejects.toMatchObject({ code: 'ERR_LC_IO', message: expect.stringMatching(/what was there before is untouched; free disk space/) });
    expect(readFileSync(join(folder, 'a'), 'utf8')).toBe('old');
    expect(readdirSync(dir).filter((n) => n.includes('atomic'))).toEqual(['atomic']);
  });
});
