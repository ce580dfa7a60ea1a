import { deviceMemory, type LcError } from '@lc/tensor';
import { expectNoLeaks } from '@lc/tensor/testing';
import { describe, expect, test } from 'vitest';
import { ActivationStore, makeSpans, planStore } from '../src/index.js';

expectNoLeaks();

const row = 10 * 4; // bytes per token
const code = (fn: () => unknown): string => {
  try {
    fn();
    return 'none';
  } catch (error) {
    return (error as LcError).code;
  }
};

describe('planStore', () => {
  test('keeps the last segments on the device', () => {
    const plan = planStore({ layers: 6, tokens: 25, chunk: 10, width: 10, deviceBytes: 25 * row * 2 + 12 * row });
    expect(plan.tiers).toEqual([
      ['host', 'host', 'host'],
      ['host', 'host', 'host'],
      ['host', 'host', 'host'],
      ['device', 'host', 'host'],
      ['device', 'device', 'device'],
      ['device', 'device', 'device'],
    ]);
    expect(plan.bytes.checkpointsOnDevice).toBe((25 * 2 + 10) * row);
    expect(plan.bytes.checkpointsOnHost).toBe((25 * 3 + 15) * row);
  });

  test('gpt-oss-20b: 138,240 bytes per token, half of it with a checkpoint every second layer', () => {
    const tokens = 530_000;
    const shape = { layers: 24, tokens, chunk: 16_384, width: 2880, dtype: 'bf16', deviceBytes: 0 } as const;
    expect(planStore(shape).bytes.host / tokens).toBe(138_240);
    const every2 = planStore({ ...shape, layersPerSegment: 2 });
    expect(every2.bytes.host / tokens).toBe(69_120);
    expect(every2.bytes.scratch / tokens).toBe(5760);
    expect(every2.bytes.dx / tokens).toBe(5760);
    expect(planStore({ ...shape, deviceBytes: Number.POSITIVE_INFINITY }).bytes.staging).toBe(0);
  });

  test('says what is missing', () => {
    expect(() => planStore({ layers: 2, tokens: 5, chunk: 5, width: 10, deviceBytes: 0, hostBytes: 399 })).toThrow(
      /need 400 bytes of host memory.*hostBytes is 399/,
    );
  });
});

describe('ActivationStore', () => {
  test('allocates exactly what the plan says, at once, on the devices it says', () => {
    const shape = { layers: 5, tokens: 25, chunk: 10, width: 10, deviceBytes: 25 * row * 1.5, layersPerSegment: 2 } as const;
    for (const [dx, scratch] of [
      ['device', 'device'],
      ['host', 'host'],
    ] as const) {
      const before = { cpu: deviceMemory('cpu'), host: deviceMemory('host') };
      using store = new ActivationStore({ ...shape, dx, scratch });
      const after = { cpu: deviceMemory('cpu'), host: deviceMemory('host') };
      const { bytes } = store.plan;
      expect(after.cpu.liveBytes - before.cpu.liveBytes).toBe(bytes.device);
      expect(after.host.liveBytes - before.host.liveBytes).toBe(bytes.host);
      expect(after.cpu.byLabel.checkpoints?.liveBytes).toBe(bytes.checkpointsOnDevice);
      expect(after.host.byLabel.checkpoints?.liveBytes).toBe(bytes.checkpointsOnHost);
      expect(after.cpu.byLabel.staging?.liveBytes).toBe(bytes.staging);
      expect(after[dx === 'host' ? 'host' : 'cpu'].byLabel.dx?.liveBytes).toBe(bytes.dx);
    }
  });

  test('content survives the trip; slots are found again; misuse is refused', () => {
    using store = new ActivationStore({ layers: 4, tokens: 25, chunk: 10, width: 10, deviceBytes: 25 * row, stagingSlots: 2 });
    const all = store.checkpoints.flat();
    all.forEach((entry, i) => {
      store.write(entry).data().fill(i);
      expect(code(() => store.write(entry))).toBe(entry.tier === 'host' ? 'ERR_LC_ARGUMENT' : 'none');
      store.commit(entry);
    });
    all.forEach((entry, i) => {
      const x = store.read(entry);
      expect(x.shape).toEqual([entry.chunk === 2 ? 5 : 10, 10]);
      expect(x.data().every((value) => value === i)).toBe(true);
      store.release(entry);
    });
    const [a, b, c] = all as [(typeof all)[0], (typeof all)[0], (typeof all)[0]];
    store.read(a);
    store.read(b);
    expect(() => store.read(c)).toThrow(/all 2 staging slots are in use/);
    store.prefetch(c); // no idle slot: nothing happens
    store.release(a);
    store.read(c);
    store.reset();
    expect(code(() => store.read(a))).toBe('ERR_LC_ARGUMENT');
    store.reset(15);
    expect(store.write(all[1] as typeof a).shape).toEqual([5, 10]);
    expect(code(() => store.write(c))).toBe('ERR_LC_ARGUMENT');
    expect(code(() => store.reset(26))).toBe('ERR_LC_ARGUMENT');
    store.dispose();
    store.dispose();
    expect(code(() => store.write(a))).toBe('ERR_LC_DISPOSED');
  });

  test('spans cover the sequence', () => {
    expect(makeSpans(7, 3, null, 5).map((s) => [s.start, s.length, s.dropoutSeed])).toEqual([
      [0, 3, 5],
      [3, 3, 5],
      [6, 1, 5],
    ]);
    expect('dropoutSeed' in (makeSpans(7, 7, null)[0] as object)).toBe(false);
  });
});
