/**
 * `@lc/attention`: exact causal attention of a chunk of queries over a K/V prefix, and rotary position embedding.
 * @module @lc/attention
 */

export { type AttentionArgs, type AttentionBackwardArgs, attentionBackward, attentionForward } from './attention.js';
export { type AttentionShape, attentionWorkspaceBytes } from './plan.js';
export * as reference from './reference.js';
export { type RopeArgs, type RopeInitOptions, type RopeTable, ropeBackward, ropeForward, ropeInit, yarnRange } from './rope.js';
export { parseRopeConfig, type RopeConfig, type RopeType } from './rope-config.js';
