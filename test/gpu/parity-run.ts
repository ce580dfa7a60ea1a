/** One reference model, run on one device, against transformers' f32 numbers. */
import { loadAdapterOnto, loadModel, TrainingSession } from '@lc/models';
import { AdamW } from '@lc/qlora';
import { type Device, fill, Scope, Workspace } from '@lc/tensor';
import { seededRandom } from '../../packages/tensor/src/seeded.js';
import type { Reference } from '../parity/reference.js';
import { difference } from './numbers.js';
import { type TileRouting, withRouting } from './routing.js';

/** Errors of one run: relative ones of losses, relative Frobenius errors of gradients, by parameter. */
export interface RunErrors {
  baseLoss: number;
  adapterLoss: number;
  gradients: Record<string, number>;
  /** Of the ten AdamW steps. */
  losses: number[];
}

export interface Run extends RunErrors {
  /** Two gradient passes gave the same bits. */
  sameBits: boolean;
  /** Experts of the gradient pass, and of everything (the order in which `forced` wants them). */
  gradientTiles: TileRouting[];
  tiles: TileRouting[];
}

const relative = (got: number, want: number): number => Math.abs(got - want) / Math.abs(want);

/**
 * How much the model itself magnifies noise: median relative error of the gradients over the relative noise (2^-16, uniform) on its embedding, in f32 on the CPU,
 * median of five draws. What bf16 makes of the gradients is this many times bf16's own rounding, unless an expert is flipped; noise so small flips none.
 */
export async function conditionOf(reference: Reference): Promise<number> {
  using scope = new Scope();
  const model = scope.own(await loadModel(reference.folder, { tile: 64 }));
  await loadAdapterOnto(model, `${reference.folder}/adapter`);
  const ws = scope.own(new Workspace());
  const tokens = reference.sequence.inputIds.length;
  const session = scope.own(new TrainingSession({ model, tokens, chunk: 96, lossChunk: 50, ws }));
  const gradients = async (): Promise<Float32Array[]> => {
    for (const p of model.parameters) fill(p.grad, 0);
    await session.step(reference.sequence);
    return Promise.all(model.parameters.map((p) => p.grad.read()));
  };
  const exact = await gradients();
  const table = model.embed.data();
  const original = table.slice();
  const random = seededRandom(3);
  const noise = 2 ** -16;
  const middle = (values: number[]): number => values.sort((a, b) => a - b)[values.length >> 1] as number;
  const factors: number[] = [];
  for (let draw = 0; draw < 5; draw++) {
    table.set(original.map((v) => v * (1 + noise * (2 * random() - 1))));
    const moved = await gradients();
    factors.push(middle(moved.map((g, i) => difference(g, exact[i] as Float32Array))) / (noise / Math.sqrt(3)));
  }
  return middle(factors);
}

/** Base loss; loss and gradients with the adapter; then ten AdamW steps, as test/fixtures/reference-models/README.md says. */
export async function runReference(reference: Reference, device: Device, forced?: readonly TileRouting[]): Promise<Run> {
  using scope = new Scope();
  const { sequence } = reference;
  const model = scope.own(await loadModel(reference.folder, { device, tile: 64 }));
  const ws = scope.own(new Workspace({ device }));
  const tokens = sequence.inputIds.length;
  const session = scope.own(new TrainingSession({ model, tokens, chunk: 96, lossChunk: 50, ws, storeOptions: { deviceBytes: 0 } }));
  const base = (await session.evaluate(sequence)).loss;
  await loadAdapterOnto(model, `${reference.folder}/adapter`);
  const tiles: TileRouting[] = [];
  /** Every part of the run takes its share of the forced routing. */
  const routed = async <T>(fn: () => Promise<T>): Promise<T> => {
    const part = await withRouting(fn, forced?.slice(tiles.length));
    tiles.push(...part.tiles);
    return part.result;
  };
  const gradients = async (): Promise<{ loss: number; all: Float32Array[] }> => {
    for (const p of model.parameters) fill(p.grad, 0);
    const { loss } = await session.step(sequence);
    return { loss, all: await Promise.all(model.parameters.map((p) => p.grad.read())) };
  };
  const first = await routed(gradients);
  const gradientTiles = tiles.slice();
  const second = await routed(gradients);
  const optimizer = scope.own(new AdamW(model.parameters, { lr: 2e-3, weightDecay: 0.01 }));
  const losses: number[] = [];
  await routed(async () => {
    for (const [want] of reference.curve) {
      optimizer.zeroGrad();
      const { loss } = await session.step(sequence);
      optimizer.step({ maxGradNorm: 1 });
      losses.push(relative(loss, want));
    }
  });
  return {
    baseLoss: relative(base, reference.loss),
    adapterLoss: relative(first.loss, reference.adapterLoss),
    gradients: Object.fromEntries(
      model.parameters.map((p, i) => [p.name, difference(first.all[i] as Float32Array, reference.gradients.get(p.name) as Float32Array)]),
    ),
    losses,
    sameBits: first.loss === second.loss && first.all.every((g, i) => g.every((v, j) => Object.is(v, second.all[i]?.[j]))),
    gradientTiles,
    tiles,
  };
}
