import { appendFileSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { TrainerEvent } from './events.js';

/** An event as a line of NDJSON. */
export function eventLine(event: TrainerEvent): string {
  return `${JSON.stringify({ schema: 1, time: new Date().toISOString(), ...event })}\n`;
}

/** Appends step, eval and save events to `metrics.jsonl` in the run folder. A full disk stops the metrics, not the run; it is told once. */
export class MetricsFile {
  private failed = false;

  constructor(
    private readonly folder: string,
    private readonly warn: (message: string) => void,
  ) {}

  write(event: TrainerEvent): void {
    if (this.failed || event.type === 'progress' || event.type === 'warning') return;
    try {
      mkdirSync(this.folder, { recursive: true });
      appendFileSync(join(this.folder, 'metrics.jsonl'), eventLine(event));
    } catch (error) {
      this.failed = true;
      this.warn(`metrics.jsonl is no longer written: ${(error as Error).message}`);
    }
  }
}
