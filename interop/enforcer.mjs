// The enforcer's program, enrolled with the authority of the run.
import path from 'node:path';
import { Process, freeAddress } from './process.mjs';

/** Starts `enforcer KIND`; config is what its configuration has besides. */
export async function startEnforcer(run, name, kind, config) {
  const admin = await freeAddress();
  const dir = path.join(run.work, name);
  const files = {
    'enrollment.json': await run.control('enroll', { name }),
    'jwks.json': JSON.stringify(run.at.keys),
    'enforcer.yaml': `enrollment: enrollment.json
state_dir: state
drain_timeout: 500ms
admin: {listen: "${admin}"}
issuers: [{url: "https://interop.example", tenant: default, jwks_file: jwks.json}]
${config}`,
  };
  const process = new Process(dir, files, path.join(run.work, 'bin', 'enforcer'), [kind, '--config', 'enforcer.yaml']);
  run.processes.push(process);
  return process.ready(`http://${admin}/readyz`, 200);
}
