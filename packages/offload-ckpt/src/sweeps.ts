/** The order of work of a step: pure bookkeeping, decided once. A sweep visits chunks of one layer with that layer's state open. */
import type { Pass } from '@lc/tensor';
import type { StoredChunk } from './slots.js';
import type { ActivationStore } from './store.js';

/** What is done to one chunk of one layer. */
export type OpKind = 'input' | 'forward' | 'loss' | 'hidden' | 'verify' | 'recompute' | 'fill' | 'backward';

export interface Op {
  readonly kind: OpKind;
  readonly chunk: number;
  /** Read. */
  readonly x: StoredChunk | null;
  /** Written; for 'loss' and 'backward' read and overwritten. */
  readonly y: StoredChunk | null;
  /** What the layer keeps of this span from forward to backward: written by 'forward', read by 'recompute' and 'backward'. */
  readonly kept: StoredChunk | null;
}

export interface Sweep {
  /** -1: no layer (input, loss, hidden). */
  readonly layer: number;
  readonly pass: Pass | null;
  readonly ops: readonly Op[];
}

/** The sweeps of a pass, and all their ops in one list, to look ahead in. */
export interface PassPlan {
  readonly sweeps: readonly Sweep[];
  readonly ops: readonly Op[];
}

export interface Passes {
  forward: PassPlan;
  loss: PassPlan;
  backward: PassPlan;
  forwardOnly: PassPlan;
}

const readsOutput = (op: Op): boolean => op.kind === 'backward' || op.kind === 'loss';

/** What an op needs to find in the store. */
export function needs(op: Op): StoredChunk[] {
  const list = op.x ? [op.x] : [];
  if (op.y && readsOutput(op)) list.push(op.y);
  return list;
}

const plan = (sweeps: Sweep[]): PassPlan => ({ sweeps, ops: sweeps.flatMap((sweep) => sweep.ops) });

export interface PassOptions {
  layers: number;
  chunks: number;
  verify: boolean;
  /** The store has one checkpoint row, whatever the number of layers: only `forwardOnly` has a plan. */
  evaluateOnly: boolean;
  /** What a layer keeps, by chunk, or null where it keeps nothing. */
  keptRow: (layer: number) => readonly (StoredChunk | null)[] | null;
}

export function buildPasses(store: ActivationStore, { layers, chunks, verify, evaluateOnly, keptRow }: PassOptions): Passes {
  const k = store.plan.layersPerSegment;
  const rows = store.plan.segments;
  const segments = Math.ceil(layers / k); // fewer than rows in a probe of the first layers
  const at = (row: Row, c: number): StoredChunk | null => row?.[c] ?? null;
  type Row = readonly (StoredChunk | null)[] | null;

  /** Where the input of a layer lies; the last layer's output goes where its gradient will be. */
  const inputRow = (layer: number): Row => {
    if (layer === layers) return store.dx;
    const inside = layer % k;
    return inside === 0 ? (store.checkpoints[layer / k] as StoredChunk[]) : (store.scratch[inside - 1] as StoredChunk[]);
  };
  const rightwards = (kind: OpKind, x: Row, y: Row, kept: Row = null): Op[] =>
    Array.from({ length: chunks }, (_, chunk) => ({ kind, chunk, x: at(x, chunk), y: at(y, chunk), kept: at(kept, chunk) }));
  const leftwards = (kind: OpKind, x: Row, y: Row, kept: Row): Op[] => rightwards(kind, x, y, kept).reverse();

  // Without checkpoints, two rows of the store take turns.
  const turn = (layer: number): Row => (layer % 2 === 0 ? (store.checkpoints[rows - 1] as StoredChunk[]) : store.dx);
  const forwardOnly: Sweep[] = [{ layer: -1, pass: null, ops: rightwards('input', null, turn(0)) }];
  for (let layer = 0; layer < layers; layer++)
    forwardOnly.push({ layer, pass: 'forward', ops: rightwards('forward', turn(layer), turn(layer + 1)) });
  forwardOnly.push({ layer: -1, pass: null, ops: rightwards('hidden', turn(layers), null) });

  if (evaluateOnly) return { forward: plan([]), loss: plan([]), backward: plan([]), forwardOnly: plan(forwardOnly) };

  const forward: Sweep[] = [{ layer: -1, pass: null, ops: rightwards('input', null, inputRow(0)) }];
  for (let layer = 0; layer < layers; layer++)
    forward.push({ layer, pass: 'forward', ops: rightwards('forward', inputRow(layer), inputRow(layer + 1), keptRow(layer)) });

  const loss: Sweep[] = [{ layer: -1, pass: null, ops: rightwards('loss', null, store.dx) }];

  const backward: Sweep[] = [];
  for (let s = segments - 1; s >= 0; s--) {
    const first = s * k;
    const end = Math.min(layers, first + k);
    // The last segment's layer inputs still lie in scratch from the forward.
    if (s < segments - 1) {
      for (let layer = first; layer < end - 1; layer++)
        backward.push({ layer, pass: 'forward', ops: rightwards('recompute', inputRow(layer), inputRow(layer + 1), keptRow(layer)) });
    }
    for (let layer = end - 1; layer >= first; layer--) {
      if (verify) backward.push({ layer, pass: 'forward', ops: rightwards('verify', inputRow(layer), null) });
      const ops = [...rightwards('fill', inputRow(layer), null), ...leftwards('backward', inputRow(layer), store.dx, keptRow(layer))];
      backward.push({ layer, pass: 'backward', ops });
    }
  }

  return { forward: plan(forward), loss: plan(loss), backward: plan(backward), forwardOnly: plan(forwardOnly) };
}

/**
 * Before op `i` runs: asks for what it and the next `ahead` ops need, unless an op in between is to write it first. What one of them needs and is there already does not give way to what a
 * later one needs.
 */
export function prefetch(store: ActivationStore, kept: ActivationStore | null, ops: readonly Op[], i: number, ahead: number): void {
  const soon = ops.slice(i, i + ahead + 1);
  const stays = new Set(soon.flatMap((op) => [...needs(op), ...(op.kept ? [op.kept] : [])]));
  for (const [j, op] of soon.entries()) {
    for (const entry of needs(op)) if (!soon.slice(0, j).some(({ y }) => y === entry)) store.prefetch(entry, stays);
    if (op.kept && op.kind !== 'forward') kept?.prefetch(op.kept, stays);
  }
}
