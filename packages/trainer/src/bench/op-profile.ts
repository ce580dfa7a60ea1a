/** Device time by op: an event before and after every native call that launches something on the compute stream. */
import { type DeviceLike, defaultStream, Event, Stream, Tensor, traceCalls } from '@lc/tensor';

/** All calls of an op with the same sizes. */
export interface OpTime {
  op: string;
  calls: number;
  /** Milliseconds of device time; on the CPU of the calls. */
  ms: number;
}

type Args = Record<string, unknown>;
const isArgs = (value: unknown): value is Args => typeof value === 'object' && value !== null;

const dims = (a: unknown): readonly number[] => (a instanceof Tensor ? a.shape : []);
const product = ({ a, c, transA }: Args): string => `${dims(c).slice(-2).join(' x ')} x ${dims(a).at(transA ? 0 : -1)}`;

/** Names an op by what decides its time: products by m x n x k, attention by its window; all else by its name alone, for its sizes are those of the products. */
function nameOf(name: string, args: Args): string {
  if (name === 'gemm' || name === 'groupedGemm') {
    const { a, b } = args as { a: Tensor; b: Tensor };
    return `${name} ${product(args)}${a.dtype === b.dtype ? '' : ', one side f32'}`;
  }
  if ('window' in args && 'lse' in args) return `attention ${name}, ${args.window ? `window ${String(args.window)}` : 'full'}`;
  return name;
}

/** Runs `work`, which only queues calls, and adds up the time of each op. What lies between calls (gaps, and these events) is in none. */
export async function profileOps(device: DeviceLike, work: () => Promise<unknown>, sync: () => Promise<void>): Promise<OpTime[]> {
  const compute = defaultStream(device);
  const calls: { op: string; before: Event; after: Event }[] = [];
  const onCompute = (args: unknown): args is Args =>
    isArgs(args) &&
    !(args.stream instanceof Stream && args.stream !== compute) &&
    Object.values(args).some((value) => value instanceof Tensor && value.device === compute.device);
  const mark = (): Event => {
    const event = new Event(device, { timing: true });
    event.record(compute);
    return event;
  };
  try {
    traceCalls((name, [args], call) => {
      if (!onCompute(args)) return call();
      const before = mark();
      const result = call();
      calls.push({ op: nameOf(name, args), before, after: mark() });
      return result;
    });
    await work();
    traceCalls(null);
    await sync();
    const times = new Map<string, OpTime>();
    for (const { op, before, after } of calls) {
      const time = times.get(op) ?? { op, calls: 0, ms: 0 };
      time.calls++;
      time.ms += after.elapsedSince(before);
      times.set(op, time);
    }
    return [...times.values()].sort((a, b) => b.ms - a.ms);
  } finally {
    traceCalls(null);
    for (const { before, after } of calls) {
      before.dispose();
      after.dispose();
    }
  }
}
