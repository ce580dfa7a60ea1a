/** `planStore(...).bytes` of `@lc/offload-ckpt` in closed form, for searches over lengths: that one lists the tier of every chunk. A test holds the two together. */
import type { planStore } from '@lc/offload-ckpt';

interface Shape {
  layers: number;
  tokens: number;
  chunk: number;
  width: number;
  layersPerSegment: number;
  dtype: 'f32' | 'bf16' | 'u8';
  deviceBytes: number;
  /** A store of checkpoints alone. */
  dx?: 'none';
}

const itemBytes = { f32: 4, bf16: 2, u8: 1 } as const;

/** Defaults as there: dx and scratch on the device, four staging slots when anything is on the host. */
export function storeBytes(o: Shape): { bytes: ReturnType<typeof planStore>['bytes'] } {
  const tokenBytes = o.width * itemBytes[o.dtype];
  const row = o.tokens * tokenBytes;
  const dx = o.dx === 'none' ? 0 : row;
  const segments = Math.ceil(o.layers / o.layersPerSegment);
  // Whole segments, the last first; then whole chunks of one more, the first first. The short chunk at its end would complete it.
  const whole = Math.min(segments, Math.floor(o.deviceBytes / row));
  const part = whole < segments ? Math.floor((o.deviceBytes - whole * row) / (o.chunk * tokenBytes)) * o.chunk * tokenBytes : 0;
  const checkpointsOnDevice = whole * row + part;
  const checkpointsOnHost = segments * row - checkpointsOnDevice;
  const scratch = (Math.min(o.layersPerSegment, o.layers) - 1) * row;
  const staging = checkpointsOnHost > 0 ? 4 * Math.min(o.chunk, o.tokens) * tokenBytes : 0;
  return {
    bytes: {
      ...{ checkpointsOnDevice, checkpointsOnHost, dx, scratch, staging },
      device: checkpointsOnDevice + staging + dx + scratch,
      host: checkpointsOnHost,
    },
  };
}
