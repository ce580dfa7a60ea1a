/**
 * Which experts the tokens of a run went to, and runs that are told where to send them. bf16 moves a near-tie of a random router to another expert now and
 * then, and one such token changes every gradient: with the f32 run's routing forced on the bf16 run, what is left is rounding.
 */
import { add, copy, empty, fromTypedArray, Scope, type Tensor } from '@lc/tensor';
import { native, type TiledMlpNative } from '../../packages/tiled-mlp/src/native.js';

type RouteArgs = Parameters<TiledMlpNative['route']>[0];

/** The routing of one tile: experts of each token, [tokens * topK]. */
export interface TileRouting {
  readonly ids: Int32Array;
  readonly topK: number;
}

/**
 * Runs `fn`; returns its result and the routing of every tile in the order of the calls. With `forced` (another run's, of the same chunks and tiles), a
 * token's other experts get a logit of -1e30: their probability is zero, and what the k are normalized by is their own sum.
 */
export async function withRouting<T>(fn: () => Promise<T>, forced?: readonly TileRouting[]): Promise<{ result: T; tiles: TileRouting[] }> {
  using scope = new Scope();
  const calls: { ids: Tensor; topK: number }[] = [];
  const addon = native();
  const original = addon.route;
  addon.route = (args: RouteArgs): void => {
    const { logits, topK } = args;
    if (forced) {
      if (args.softmaxFirst && !args.normalize) throw new Error('probabilities that are not normalized cannot be forced');
      const tile = forced[calls.length];
      const [tokens, experts] = logits.shape as [number, number];
      if (!tile || tile.ids.length !== tokens * topK) throw new Error(`tile ${calls.length}: the forced routing is of another run`);
      const mask = new Float32Array(tokens * experts).fill(-1e30);
      tile.ids.forEach((expert, pair) => {
        mask[Math.floor(pair / topK) * experts + expert] = 0;
      });
      using host = fromTypedArray(mask, [tokens, experts]);
      const there = scope.own(empty([tokens, experts], { device: logits.device }));
      copy(there, host);
      add({ a: logits, b: there, out: logits });
    }
    original(args);
    const ids = scope.own(empty(args.ids.shape, { dtype: 'i32', device: args.ids.device }));
    copy(ids, args.ids);
    calls.push({ ids, topK });
  };
  try {
    const result = await fn();
    const tiles = await Promise.all(calls.map(async ({ ids, topK }) => ({ ids: await ids.read<Int32Array>(), topK })));
    return { result, tiles };
  } finally {
    addon.route = original;
  }
}

/** Tokens (once per layer and pass) whose set of experts differs between two runs, and how many there are. */
export function flipped(a: readonly TileRouting[], b: readonly TileRouting[]): { flipped: number; routed: number } {
  const set = ({ ids, topK }: TileRouting, token: number): string =>
    ids
      .subarray(token * topK, (token + 1) * topK)
      .slice()
      .sort()
      .join();
  const sum = { flipped: 0, routed: 0 };
  a.forEach((tile, i) => {
    for (let token = 0; token < tile.ids.length / tile.topK; token++) {
      sum.routed++;
      if (set(tile, token) !== set(b[i] as TileRouting, token)) sum.flipped++;
    }
  });
  return sum;
}
