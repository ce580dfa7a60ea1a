// npm start [-- path/to/model]: the service on 127.0.0.1:8080. It has no authentication: put yours in front before another machine can reach it.
import { createService } from './service.js';

const { server, cancel } = createService({ modelFolder: process.argv[2] ?? '../quickstart/tiny-gpt-oss', runsFolder: 'outputs' });
server.listen(8080, '127.0.0.1', () => console.log('http://127.0.0.1:8080'));
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => {
    server.close(); // takes no new run; the process ends when the one that runs has saved what it learned
    cancel(signal);
  });
}
