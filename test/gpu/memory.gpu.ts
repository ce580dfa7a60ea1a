/** Device memory as the driver counts it: the cap, plans against what is really taken, profiles, pinned memory. */
import { execFileSync } from 'node:child_process';
import { type CausalLM, syntheticModel } from '@lc/models';
import { AdamW } from '@lc/qlora';
import {
  defaultStream,
  deviceMemory,
  empty,
  isPinned,
  LcError,
  memInfo,
  processMemory,
  resetPeak,
  setVramLimit,
  type Tensor,
  upload,
} from '@lc/tensor';
import { seededRandom } from '@lc/tensor/testing';
import { type Attempt, type Budgets, planStep, type ReserveOptions, reserveStep } from '@lc/trainer';
import type { Plan } from '@lc/vram-probe';
import { assert, largeTest } from './harness.js';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const mib = (bytes: number): string => `${(bytes / MiB).toFixed(0)} MiB`;
const say = (text: string): void => console.log(`     ${text}`);

function refused(fn: () => unknown, pattern: RegExp): void {
  try {
    fn();
  } catch (error) {
    const { code, message } = error as { code: string; message: string };
    assert(code === 'ERR_LC_OUT_OF_MEMORY' && pattern.test(message), `expected ERR_LC_OUT_OF_MEMORY ${pattern}, got ${code}: ${message}`);
    return;
  }
  throw new Error(`expected ERR_LC_OUT_OF_MEMORY ${pattern}, nothing was thrown`);
}

/** nvidia-smi's own count, where it is installed: by process and of the device. */
function nvidiaSmi(): string {
  try {
    const ask = (query: string): string =>
      execFileSync('nvidia-smi', [query, '--format=csv,noheader'], { encoding: 'utf8' }).trim().replaceAll('\n', '; ');
    return `processes ${ask('--query-compute-apps=pid,used_memory')}; device ${ask('--query-gpu=memory.used')}`;
  } catch {
    return 'not installed';
  }
}

largeTest('vram: limit, what the driver counts, and an allocator that stays within', async () => {
  const before = processMemory('cuda');
  say(
    `this process: ${mib(before.bytes)}, ${mib(before.bytes - before.poolBytes)} of them outside the pool, counted by '${before.source}'; nvidia-smi: ${nvidiaSmi()}`,
  );
  assert(before.bytes > 100 * MiB && before.limitBytes === null, 'a context takes more than 100 MiB');
  const limit = Math.ceil(before.bytes / MiB) * MiB + 2 * GiB;
  setVramLimit('cuda', limit);
  try {
    const m = memInfo('cuda');
    assert(
      m.totalBytes === limit && m.freeBytes <= 2 * GiB + MiB && m.freeBytes > 2 * GiB - 256 * MiB,
      `free ${mib(m.freeBytes)} of ${mib(m.totalBytes)}`,
    );
    const one = empty([GiB], { dtype: 'u8', device: 'cuda' });
    refused(() => empty([1.5 * GiB], { dtype: 'u8', device: 'cuda' }), /limit of .*vramLimit/);
    assert(processMemory('cuda').bytes <= limit, 'within the limit after a refusal');
    one.dispose();
    empty([Math.floor(1.9 * GiB)], { dtype: 'u8', device: 'cuda' }).dispose(); // what was freed serves again
    refused(() => setVramLimit('cuda', 200 * MiB), /takes already/);
    assert(processMemory('cuda').limitBytes === limit, 'a refused limit leaves the old one');

    // Sizes of all kinds come and go; the driver never counts more than the limit, and whatever fits by far is given.
    const random = seededRandom(5);
    const held: Tensor[] = [];
    let [given, denied, most] = [0, 0, 0];
    for (let i = 0; i < 400; i++) {
      if (held.length > 0 && random() < 0.45) held.splice(Math.floor(random() * held.length), 1)[0]?.dispose();
      const bytes = Math.floor(2 ** (10 + 20.5 * random()));
      const free = memInfo('cuda').freeBytes;
      try {
        held.push(empty([bytes], { dtype: 'u8', device: 'cuda' }));
        given++;
      } catch (error) {
        assert((error as { code: string }).code === 'ERR_LC_OUT_OF_MEMORY', String(error));
        assert(bytes > free - 1600 * MiB, `${mib(bytes)} refused with ${mib(free)} free`);
        denied++;
      }
      most = Math.max(most, processMemory('cuda').bytes);
      assert(most <= limit, `the driver counts ${mib(most)}, the limit is ${mib(limit)}`);
    }
    assert(denied > 0 && given > 50, `given ${given}, denied ${denied}`);
    for (const t of held) t.dispose();
    const { peakBytes } = processMemory('cuda');
    say(`400 allocations: ${denied} refused; most ${mib(most)}, peak ${mib(peakBytes)} of ${mib(limit)}`);
    assert(peakBytes <= limit + 32 * MiB, 'the peak is within the limit, but for a refused piece');
  } finally {
    setVramLimit('cuda', null);
  }
});

largeTest("vram: the pool's rounding, and its waste beside large allocations", () => {
  const base = processMemory('cuda');
  const held = [0.3, 5, 33, 100.3, 100.3, 100.3, 700.7].map((m) => empty([Math.floor(m * MiB)], { dtype: 'u8', device: 'cuda' }));
  const { poolBytes, poolUsedBytes, bytes } = processMemory('cuda');
  say(
    `1039.9 MiB in 7 pieces: pool ${mib(poolBytes - base.poolBytes)} more, used ${mib(poolUsedBytes - base.poolUsedBytes)}, driver ${mib(bytes - base.bytes)} more`,
  );
  for (const t of held) t.dispose();
});

const SHAPE = { layers: 4, tokens: 32_768 };
async function build(): Promise<CausalLM> {
  const targetModules = ['q_proj', 'k_proj', 'v_proj', 'o_proj'];
  return syntheticModel('gpt-oss-20b', {
    layers: SHAPE.layers,
    device: 'cuda',
    loadIn4bit: true,
    lora: { r: 8, loraAlpha: 16, targetModules },
  });
}

interface Outcome {
  reserved: { plan: Plan; attempts: readonly Attempt[] };
  loss: number;
  norm: number;
  gradients: Float32Array[];
}
let warm = false;
async function run(model: CausalLM, name: string, o: Partial<ReserveOptions>): Promise<Outcome> {
  using optimizer = new AdamW(model.parameters, { lr: 0 });
  const warnings: string[] = [];
  const from = performance.now();
  const reserved = reserveStep({ model, tokens: SHAPE.tokens, profile: true, onWarning: (message) => warnings.push(message), ...o });
  try {
    const reserveMs = performance.now() - from;
    resetPeak(); // from here on: before, the pool held what an earlier case took without a limit
    const { plan, session, workspace } = reserved;
    const inputIds = Int32Array.from({ length: SHAPE.tokens }, (_, i) => (i * 7919) % model.config.vocabSize);
    const made = (): number => deviceMemory('cuda').allocations + deviceMemory('host').allocations;
    const outside = (): number => processMemory('cuda').bytes - processMemory('cuda').poolBytes;
    const outsideBefore = outside();
    for (const time of [0, 1]) {
      optimizer.zeroGrad();
      if (time === 1) await session.schedule.profile();
      const start = performance.now();
      const before = made();
      const { loss } = await session.step({ inputIds, labels: inputIds });
      assert(!warm || made() === before, `${made() - before} allocations in a step, a reservation's first included`);
      warm = true; // the process's first step makes tables that stay
      const { gradNorm } = optimizer.step({ maxGradNorm: 1 });
      if (time === 0) continue;
      const wall = performance.now() - start;
      const phases = await session.schedule.profile();
      const sum = Object.values(phases).reduce((total, { ms }) => total + ms, 0);
      const waits = Object.values(phases).reduce((total, { waitMs }) => total + waitMs, 0);
      const memory = processMemory('cuda');
      say(
        `${name}: chunk ${plan.chunk}, tile ${plan.tile}, loss ${plan.lossChunk}, checkpoints ${mib(plan.checkpoints.deviceBytes)} + ${mib(plan.checkpoints.hostBytes)} host, ` +
          `kept ${plan.keep.layers} (${mib(plan.keep.deviceBytes)} + ${mib(plan.keep.hostBytes)}); attempts ${reserved.attempts.map((a) => a.failed).join(',') || 0}; reserved in ${reserveMs.toFixed(0)} ms`,
      );
      say(
        `  step ${wall.toFixed(0)} ms, device ${sum.toFixed(0)}: ${Object.entries(phases)
          .map(([phase, { ms, waitMs }]) => `${phase} ${ms.toFixed(0)}${waitMs > 0.05 ? ` (waits ${waitMs.toFixed(1)})` : ''}`)
          .join(', ')}; waits in all ${waits.toFixed(1)} ms`,
      );
      say(
        `  predicted ${mib(plan.predictedPeak.device - plan.bytes.context)}; workspace ${mib(plan.bytes.workspace)}, taken ${mib(workspace.peakBytes)}; pool ${mib(memory.poolBytes)}, used ${mib(memory.poolUsedBytes)}; ` +
          `driver peak ${mib(memory.peakBytes)}${memory.limitBytes ? ` of ${mib(memory.limitBytes)}` : ''}; outside the pool ${mib(outsideBefore)} -> ${mib(outside())}`,
      );
      assert(Math.abs(sum - wall) < 0.1 * wall + 20, `phases add up to ${sum.toFixed(0)} ms of a step of ${wall.toFixed(0)}`);
      const fewer = reserved.attempts.length > 0 ? 1 : 0;
      assert(warnings.length === fewer && warnings.every((w) => /failed .*cuda:0.* runs with a smaller plan/.test(w)), warnings.join('; '));
      for (const warning of warnings) say(`  warned: ${warning}`);
      assert(workspace.peakBytes <= plan.bytes.workspace, 'the workspace was too small');
      if (memory.limitBytes) assert(memory.peakBytes <= memory.limitBytes + 32 * MiB, 'the driver counted more than the limit');
      const gradients: Float32Array[] = [];
      for (const p of model.parameters) gradients.push(await p.grad.read());
      return { reserved: { plan, attempts: reserved.attempts }, loss, norm: gradNorm, gradients };
    }
    throw new Error('unreachable');
  } finally {
    await reserved.session.schedule.store.sync();
    reserved.dispose();
    setVramLimit('cuda', null);
  }
}

/** Relative Frobenius error of all gradients together. */
function difference(a: Outcome, b: Outcome): number {
  let [num, den] = [0, 0];
  for (const [i, g] of a.gradients.entries()) {
    const h = b.gradients[i] as Float32Array;
    for (let j = 0; j < g.length; j++) {
      num += ((g[j] as number) - (h[j] as number)) ** 2;
      den += (g[j] as number) ** 2;
    }
  }
  return Math.sqrt(num / den);
}

largeTest('vram: plans of a step: on a big card, within a small one, and after a reservation that failed', async () => {
  using model = await build();
  // At first B is zero, and with it half of the gradients.
  for (const p of model.parameters) if (p.name.includes('lora_B')) randomize(p.value);
  await defaultStream('cuda').sync();
  const big = await run(model, 'big card', {});
  const sizes = { chunk: 8192, tile: 2048, lossChunk: 1024 };
  const device = await run(model, 'checkpoints on the device, nothing kept', { ...sizes, keep: 0 });
  const host = await run(model, 'checkpoints and kept outputs on the host', { ...sizes, checkpointDeviceBytes: 0 });
  assert(device.loss === host.loss && difference(device, host) === 0, 'where checkpoints lie, and what is kept, changes no bit');
  const taken = processMemory('cuda');
  const small = await run(model, 'small card', { vramLimit: Math.ceil(taken.bytes - taken.poolBytes + taken.poolUsedBytes + 4.2 * GiB) });
  say(
    `big against small card: loss ${big.loss.toFixed(5)} and ${small.loss.toFixed(5)}, gradients differ by ${difference(big, small).toExponential(1)}`,
  );
  assert(Math.abs(big.loss - small.loss) < 2e-3 && difference(big, small) < 0.2, 'other sizes change results by bf16 noise only');
  // Budgets that promise what is not there.
  const limit = Math.ceil(taken.bytes - taken.poolBytes + taken.poolUsedBytes + 5 * GiB);
  const again = await run(model, 'promised too much', { vramLimit: limit, budgets: { vram: 40 * GiB, ram: 20 * GiB } });
  assert(Math.abs(big.loss - again.loss) < 2e-3, `loss ${again.loss}`);
  assert(again.reserved.attempts.length > 0 && again.reserved.attempts.every((a) => a.failed === 'VRAM'), 'a plan of 40 GiB fails');
});

/** What is free; the first time, all but `left` bytes of it is gone once it was measured. */
function foiled(left: number, hog: Tensor[]): () => Budgets {
  return () => {
    const vram = memInfo('cuda').freeBytes * 0.99 - 256 * MiB;
    if (hog.length === 0)
      hog.push(empty([Math.floor(memInfo('cuda').freeBytes - left)], { dtype: 'u8', device: 'cuda', label: 'someone else' }));
    return { vram, ram: memInfo('cpu').freeBytes * 0.5 };
  };
}

largeTest('vram: memory that is gone when it is reserved: a smaller plan of the same bits, or an error that says what fits', async () => {
  using model = await build();
  for (const p of model.parameters) if (p.name.includes('lora_B')) randomize(p.value);
  await defaultStream('cuda').sync();
  const sizes = { chunk: 8192, tile: 2048, lossChunk: 1024 };
  const roomy = await run(model, 'nobody else', sizes);
  const { predictedPeak, checkpoints, keep } = roomy.reserved.plan;
  assert(checkpoints.hostBytes === 0 && keep.layers > 0 && keep.hostBytes === 0, 'all on the device at first');
  const hog: Tensor[] = [];
  try {
    // cudaMallocAsync itself refuses: no limit is set.
    const tight = await run(model, 'half of that is gone', {
      ...sizes,
      budgets: foiled(predictedPeak.device - checkpoints.deviceBytes, hog),
    });
    assert(tight.reserved.attempts.length > 0 && tight.reserved.attempts.every((a) => a.failed === 'VRAM'), 'VRAM ran out');
    assert(
      tight.reserved.attempts.every((a) => / of .* free/.test(a.message)),
      tight.reserved.attempts.map((a) => a.message).join('; '),
    );
    assert(tight.reserved.plan.predictedPeak.device < predictedPeak.device, 'a smaller plan');
    assert(tight.loss === roomy.loss && difference(tight, roomy) === 0, 'what moved to the host changes no bit');

    const least = (tokens: number): number => {
      let [no, yes] = [0, predictedPeak.device];
      while (yes - no > MiB) {
        const vram = (no + yes) / 2;
        if (planStep({ model, tokens, budgets: { vram, ram: 2 ** 40 } }).fits) yes = vram;
        else no = vram;
      }
      return yes;
    };
    const [half, whole] = [least(SHAPE.tokens / 2), least(SHAPE.tokens)];
    for (const t of hog.splice(0)) t.dispose();
    const live = deviceMemory('cuda').liveBytes;
    const options = { model, tokens: SHAPE.tokens, budgets: foiled(((half + whole) / 2 + 256 * MiB) / 0.99, hog) };
    const error = failure(() => reserveStep(options).dispose());
    say(
      `${mib(whole)} are the least that ${SHAPE.tokens} tokens need, ${mib(half)} half as many, ${mib(memInfo('cuda').freeBytes)} are left: ${error.code}: ${error.message}`,
    );
    assert(error instanceof LcError && error.code === 'ERR_LC_PLAN', error.code);
    const fits = Number(
      /32768 tokens do not fit: VRAM.*The longest length that fits: (\d+).*last reservation failed: VRAM/s.exec(error.message)?.[1],
    );
    assert(fits >= SHAPE.tokens / 2 && fits < SHAPE.tokens, `longest ${fits}`);
    assert(deviceMemory('cuda').liveBytes === live + (hog[0] as Tensor).nbytes, 'nothing stays reserved');
    reserveStep({ ...options, tokens: fits }).dispose();
  } finally {
    for (const t of hog) t.dispose();
  }
  const again = await run(model, 'free again', sizes);
  assert(again.loss === roomy.loss && difference(again, roomy) === 0, 'the failures left nothing behind');
});

function failure(fn: () => void): LcError {
  try {
    fn();
  } catch (error) {
    return error as LcError;
  }
  throw new Error('nothing was thrown');
}

function randomize(t: Tensor): void {
  const random = seededRandom(t.numel);
  upload(
    t,
    Float32Array.from({ length: t.numel }, () => 0.02 * (random() - 0.5)),
  );
}

largeTest('vram: a large pinned arena', () => {
  for (const gibs of [1, 4]) {
    const from = performance.now();
    using t = empty([gibs * GiB], { dtype: 'u8', device: 'host' });
    const ms = performance.now() - from;
    assert(isPinned(t), 'pinned');
    say(`${gibs} GiB pinned in ${ms.toFixed(0)} ms`);
  }
});
