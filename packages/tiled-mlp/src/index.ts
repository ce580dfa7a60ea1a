/**
 * `@lc/tiled-mlp`: dense and mixture-of-experts MLPs over tiles of tokens, forward and exact backward in memory of one tile.
 * @module @lc/tiled-mlp
 */

export * as reference from './reference.js';
export { TiledBlock, type TiledBlockOptions } from './tiled-block.js';
export { type HiddenAct, TiledMLP, type TiledMLPOptions } from './tiled-mlp.js';
export { TiledMoE, type TiledMoEOptions } from './tiled-moe.js';
