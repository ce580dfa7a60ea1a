/** docs/compose.md: a trainer from the parts alone. The code is taken from the page. */
import { deviceMemory, memory, type Parameter } from '@lc/tensor';
import { expectNoLeaks, randomNormal, relativeError } from '@lc/tensor/testing';
import { beforeAll, expect, it } from 'vitest';
import { snippetModule } from '../snippets.mjs';

expectNoLeaks();

interface Trainer extends Disposable {
  parameters: readonly Parameter[];
  gradients(ids: Int32Array): number;
  step(ids: Int32Array): number;
}
interface Page {
  MyTrainer: new (options: { tokens: number; chunk: number; tile?: number; lossChunk?: number; deviceBytes?: number }) => Trainer;
  sequence(tokens: number): Int32Array;
  losses: number[];
}
let page: Page;
beforeAll(async () => {
  page = (await import(/* @vite-ignore */ snippetModule('docs/compose.md'))) as Page;
});

const TOKENS = 131;
/** lora_B starts at zero, which would hide half of the gradients. */
const stir = (trainer: Trainer): void =>
  trainer.parameters.forEach(({ name, value }, i) => {
    if (name.includes('lora_B')) value.data().set(randomNormal(value.numel, i, 0.05));
  });
function lossAndGradients(options: { chunk: number; tile?: number; lossChunk?: number; deviceBytes?: number }) {
  using trainer = new page.MyTrainer({ tokens: TOKENS, ...options });
  stir(trainer);
  const loss = trainer.gradients(page.sequence(TOKENS));
  return { loss, gradients: trainer.parameters.map(({ grad }) => grad.data().slice()) };
}

it('the page trains: its loss falls', () => {
  expect(page.losses).toHaveLength(20);
  expect(page.losses[0]).toBeGreaterThan(3);
  expect(page.losses.at(-1)).toBeLessThan((page.losses[0] as number) - 1);
});

it('chunks, tiles, loss chunks and the place of checkpoints do not change loss and gradients beyond rounding', () => {
  const whole = lossAndGradients({ chunk: TOKENS, tile: TOKENS, lossChunk: TOKENS, deviceBytes: 1e9 });
  expect(whole.gradients.every((g) => g.some((value) => value !== 0))).toBe(true);
  for (const options of [
    { chunk: 64, tile: 16, lossChunk: 5 },
    { chunk: 7, deviceBytes: 0 },
    { chunk: 32, deviceBytes: 1e9 },
  ]) {
    const { loss, gradients } = lossAndGradients(options);
    expect(Math.abs(loss - whole.loss)).toBeLessThan(1e-6 * whole.loss);
    gradients.forEach((g, i) => expect(relativeError(g, whole.gradients[i] as Float32Array)).toBeLessThan(1e-5));
  }
});

it('the gradient is the derivative of the loss', () => {
  using trainer = new page.MyTrainer({ tokens: TOKENS, chunk: 50 });
  stir(trainer);
  const ids = page.sequence(TOKENS);
  trainer.gradients(ids);
  const gradients = trainer.parameters.map(({ grad }) => grad.data().slice());
  // One direction for all parameters at once, along the gradient's signs: no share of it cancels.
  const directions = gradients.map((g) => g.map((value) => Math.sign(value)));
  const slope = gradients.reduce((sum, g) => sum + g.reduce((s, value) => s + Math.abs(value), 0), 0);
  const values = trainer.parameters.map(({ value }) => value.data().slice());
  const lossAt = (t: number): number => {
    trainer.parameters.forEach(({ value }, i) => {
      const direction = directions[i] as Float32Array;
      value.data().set((values[i] as Float32Array).map((v, j) => v + t * (direction[j] as number)));
    });
    return trainer.gradients(ids);
  };
  // Fourth-order difference: its error is of order t^4 = 1e-12 times the fifth derivative, f32 noise in the loss about 1e-7 / t = 1e-4.
  const t = 1e-3;
  const numeric = (8 * (lossAt(t) - lossAt(-t)) - (lossAt(2 * t) - lossAt(-2 * t))) / (12 * t);
  expect(Math.abs(numeric - slope) / slope).toBeLessThan(5e-4);
});

it('a step after the first allocates nothing, and checkpoints lie on the host when told so', () => {
  using trainer = new page.MyTrainer({ tokens: TOKENS, chunk: 32, deviceBytes: 0 });
  const ids = page.sequence(TOKENS);
  trainer.step(ids);
  const allocations = (): number[] => Object.values(memory().devices).map((device) => device.allocations);
  const before = allocations();
  trainer.step(ids);
  trainer.step(ids);
  expect(allocations()).toEqual(before);
  expect(deviceMemory('host').liveBytes).toBeGreaterThanOrEqual(3 * TOKENS * 64 * 4);
});
