/** What the store asks of streams and events. `Stream` and `Event` of `@lc/tensor` satisfy it; tests put late-running ones in their place. */
import { type Device, Event, Stream, type Tensor } from '@lc/tensor';

export interface StreamLike {
  /** dst = src, ordered on this stream; dtype and shape are the same. */
  copy(dst: Tensor, src: Tensor): void;
  /** Later work of this stream starts after the latest `record` of `event` made so far (none: no wait). */
  wait(event: EventLike): void;
  /** Resolves when everything queued so far is done. */
  sync(): Promise<void>;
  dispose(): void;
}

export interface EventLike {
  record(stream: StreamLike): void;
  /** Resolves when everything before the latest `record` is done. */
  sync(): Promise<void>;
  /** Milliseconds from an earlier event to this one, both made with `timing` and done. Profiles need it. */
  elapsedSince?(earlier: EventLike): number;
  dispose(): void;
}

/** Makes the store's two copy streams and its events. */
export interface StreamFactory {
  stream(device: Device): StreamLike;
  event(device: Device, options?: { timing?: boolean }): EventLike;
}

export const tensorStreams: StreamFactory = {
  stream: (device) => new Stream(device),
  event: (device, options) => new Event(device, options),
};
