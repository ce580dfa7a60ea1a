/** What a person sees: the plan, a progress bar on a terminal, plain lines elsewhere. Everything goes to stderr, so stdout stays clean. */
import cliProgress from 'cli-progress';
import pc from 'picocolors';
import type { StepEvent, TrainerEvent } from '../events.js';

export const gib = (bytes: number): string =>
  bytes < 1 << 30 ? `${(bytes / (1 << 20)).toFixed(bytes < 10 << 20 ? 1 : 0)} MiB` : `${(bytes / (1 << 30)).toFixed(2)} GiB`;

export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return '?';
  const s = Math.round(seconds);
  const parts = [Math.floor(s / 3600), Math.floor((s % 3600) / 60), s % 60];
  return parts[0]
    ? `${parts[0]}h${String(parts[1]).padStart(2, '0')}m`
    : parts[1]
      ? `${parts[1]}m${String(parts[2]).padStart(2, '0')}s`
      : `${s}s`;
}

const stepText = (e: StepEvent): string =>
  `loss ${e.loss.toFixed(4)} | ${Math.round(e.tokensPerSecond)} tok/s | device ${gib(e.deviceBytes)} host ${gib(e.hostBytes)} | ETA ${duration(e.etaSeconds)}`;

/** Consumes a trainer's events; call `stop()` at the end, also after an error. */
export class ProgressDisplay {
  private bar: cliProgress.SingleBar | undefined;
  private text = 'first step';
  private done = 0;

  constructor(private readonly out: NodeJS.WriteStream = process.stderr) {}

  /** Shows an event. */
  handle(event: TrainerEvent): void {
    switch (event.type) {
      case 'plan':
        this.line(
          `${pc.bold('plan')}  ${event.device} | ${event.tokens} tokens in chunks of ${event.chunk}, MLP tiles of ${event.tile}, loss chunks of ${event.lossChunk} | ` +
            `predicted peak: device ${gib(event.predictedDeviceBytes)}, host ${gib(event.predictedHostBytes)} | ` +
            `${event.trainableParameters.toLocaleString('en-US')} trainable parameters, ${event.totalSteps} steps`,
        );
        if (this.out.isTTY) {
          this.bar = new cliProgress.SingleBar(
            { format: '{bar} {value}/{total} | {text}', hideCursor: true, stream: this.out, fps: 5, barsize: 24 },
            cliProgress.Presets.shades_classic,
          );
          this.bar.start(event.totalSteps, 0, { text: this.text });
        }
        break;
      case 'progress':
        this.bar?.update(this.done, { text: `${this.text} | ${event.phase} ${Math.round(event.fraction * 100)}%` });
        break;
      case 'step':
        this.done = event.step;
        this.text = stepText(event);
        if (this.bar) this.bar.update(event.step, { text: this.text });
        else
          this.line(
            `step ${event.step}/${event.totalSteps} | ${this.text} | lr ${event.learningRate.toExponential(2)} | grad ${event.gradNorm.toFixed(3)}`,
          );
        break;
      case 'eval':
        this.line(`eval  step ${event.step}: held-out loss ${event.loss.toFixed(4)} over ${event.supervisedTokens} tokens`);
        break;
      case 'save':
        this.line(`saved ${event.path}`);
        break;
      case 'warning':
        this.line(`${pc.yellow('warning')} ${event.message}`);
        break;
      case 'end':
        this.stop();
        this.line(
          event.reason === 'finished'
            ? `done; adapter in ${event.adapter}`
            : `stopped after step ${event.step}; adapter so far in ${event.adapter}`,
        );
        break;
    }
  }

  /** Ends the bar and gives the cursor back. */
  stop(): void {
    this.bar?.stop();
    this.bar = undefined;
  }

  private line(text: string): void {
    const bar = this.bar;
    if (bar) this.out.write('\r\u001b[K');
    this.out.write(`${text}\n`);
  }
}
