/** A line on stderr every ten seconds and at what is worth one, so that a long run can be watched from outside, and says how far it got when it is cut off. */
export class Ticker implements Disposable {
  private subject = '';
  private latest = '';
  private told = '';
  private readonly from = performance.now();
  private readonly timer: NodeJS.Timeout;
  /** What was noted, with the seconds since the start. */
  readonly log: string[] = [];

  /** @param onTick also told, e.g. to save what there is */
  constructor(
    private readonly name: string,
    private readonly onTick: (text: string) => void,
    every = 10_000,
  ) {
    this.timer = setInterval(() => this.tick(), every);
    this.timer.unref();
  }

  /** What is being done now. */
  about(subject: string): void {
    this.subject = subject;
    this.latest = '';
    this.tick();
  }
  /** How far it is. */
  tell(text: string): void {
    this.latest = text;
  }

  /** Something has ended: a line at once, and one that stays. */
  note(text: string): void {
    this.latest = text;
    this.log.push(`${this.seconds()} s: ${this.subject}: ${text}`);
    this.tick();
  }

  dispose(): void {
    clearInterval(this.timer);
  }
  [Symbol.dispose](): void {
    this.dispose();
  }

  private tick(): void {
    const text = [this.subject, this.latest].filter((part) => part !== '').join(': ');
    if (text === this.told) return;
    this.told = text;
    process.stderr.write(`[lc bench ${this.name}, ${this.seconds()} s] ${text}\n`);
    this.onTick(text);
  }

  private seconds(): string {
    return ((performance.now() - this.from) / 1000).toFixed(1);
  }
}
