// The official A2A client, on the transports that it has without gRPC, through the
// same cases, with an agent that is guarded itself and with one behind the proxy.
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { Role, TaskState } from '@a2a-js/sdk';
import { ClientFactory, DefaultAgentCardResolver, JsonRpcTransportFactory, RestTransportFactory } from '@a2a-js/sdk/client';

export const agents = [
  { name: '@a2a-js/sdk 1.3.0, JSON-RPC', transport: JsonRpcTransportFactory },
  { name: '@a2a-js/sdk 1.3.0, REST', transport: RestTransportFactory },
].map(stack => ({ name: stack.name, cases: (url, control, proxied = false) => cases(stack, url, control, proxied) }));

export const agent = 'https://agents.interop.example/worker';

function cases({ transport }, url, control, proxied) {
  const caller = async () => {
    const session = randomUUID();
    const token = await control('token', { user: session, session });
    return { token, revoke: () => control('revoke', { session }) };
  };
  /** Finds the agent by the gateway's card, and keeps what the server refused. */
  const connect = async ({ token }, seen = []) => {
    const fetchImpl = async (input, init = {}) => {
      const res = await fetch(input, { ...init, headers: { ...Object.fromEntries(new Headers(init.headers)), Authorization: `Bearer ${token}` } });
      if (!res.ok) seen.push({ status: res.status, challenge: res.headers.get('www-authenticate'), body: await res.clone().json().catch(() => null) });
      return res;
    };
    const factory = new ClientFactory({
      transports: [new transport({ fetchImpl })],
      cardResolver: new DefaultAgentCardResolver({ fetchImpl }),
    });
    return factory.createFromUrl(url, '');
  };
  const say = (text, taskId = '') => ({
    tenant: '', metadata: {}, configuration: undefined,
    message: {
      messageId: randomUUID(), role: Role.ROLE_USER, taskId, contextId: '', extensions: [], referenceTaskIds: [], metadata: {},
      parts: [{ content: { $case: 'text', value: text }, metadata: {}, filename: '', mediaType: '' }],
    },
  });
  /** Follows a stream; begun resolves with the task's id once it works. */
  const follow = (client, text) => {
    const s = { events: 0, task: undefined, last: undefined };
    s.begun = new Promise((resolve, reject) => {
      s.end = (async () => {
        for await (const { payload } of client.sendMessageStream(say(text))) {
          s.events++;
          s.last = payload;
          const status = payload.$case === 'statusUpdate' ? payload.value.status : undefined;
          if (status?.state === TaskState.TASK_STATE_WORKING) {
            s.task = payload.value.taskId;
            resolve();
          }
        }
      })();
      s.end.then(() => reject(new Error('it ended before it worked')), reject);
    });
    return s;
  };
  const goesOn = async s => {
    const before = s.events;
    while (s.events < before + 3) {
      const over = await Promise.race([s.end.then(() => true), new Promise(resolve => setTimeout(resolve, 10, false))]);
      assert.ok(!over, 'the bystander was cut');
    }
  };
  const cut = async s => {
    if (proxied) {
      // The task is the agent's, which knows nothing of it; the stream has an error.
      await assert.rejects(s.end, /denied: revoked: stolen-token \(seq \d+, INC-142\)/);
      return;
    }
    await s.end;
    assert.equal(s.last.$case, 'statusUpdate');
    const { status } = s.last.value;
    assert.equal(status.state, TaskState.TASK_STATE_CANCELED);
    const [text, data] = status.message.parts;
    assert.match(text.content.value, /^denied: revoked: stolen-token \(seq \d+, INC-142\)$/);
    assert.partialDeepStrictEqual(data.content.value, { error: 'revoked', reason: 'stolen-token', incident: 'INC-142' });
  };
  const refused = seen => {
    const last = seen.at(-1);
    assert.ok(last, 'the server refused nothing at HTTP');
    assert.equal(last.status, 401);
    assert.match(last.challenge, /^Bearer error="invalid_token", error_description="denied: revoked: stolen-token/);
    assert.match(last.challenge, /resource_metadata="https:/);
    const [info] = last.body.error.data ?? last.body.error.details;
    assert.partialDeepStrictEqual(info, { domain: 'a2a-protocol.org', metadata: { error: 'revoked', reason: 'stolen-token', incident: 'INC-142' } });
  };

  const all = {
    'allows': async () => {
      const res = await (await connect(await caller())).sendMessage(say('echo'));
      assert.equal(res.status.state, TaskState.TASK_STATE_COMPLETED);
    },
    'denies without a token': async () => {
      const seen = [];
      const client = await connect({ token: 'garbage' }, seen);
      await assert.rejects(client.sendMessage(say('echo')));
      assert.equal(seen.at(-1).status, 401);
      assert.match(seen.at(-1).challenge, /error="invalid_token"/);
    },
    'cuts a stream, and says why': async () => {
      const [one, bystander] = [await caller(), await caller()];
      const seen = [];
      const [client, other] = [await connect(one, seen), await connect(bystander)];
      const [s, theirs] = [follow(client, 'work'), follow(other, 'work')];
      await Promise.all([s.begun, theirs.begun]);
      await goesOn(s);
      await one.revoke();
      await cut(s);
      await assert.rejects(client.getTask({ tenant: '', id: s.task, historyLength: 0 }));
      refused(seen);
      await assert.rejects(client.sendMessage(say('echo', s.task)));
      refused(seen);
      await goesOn(theirs);
      // An agent that is not guarded itself works on, for whoever asks.
      if (proxied) await other.cancelTask({ tenant: '', id: s.task, metadata: {} });
      const ended = await other.cancelTask({ tenant: '', id: theirs.task, metadata: {} });
      assert.equal(ended.status.state, TaskState.TASK_STATE_CANCELED);
      await theirs.end;
    },
    'cuts an agent that ignores its context': async () => {
      const one = await caller();
      const s = follow(await connect(one), 'stubborn');
      await s.begun;
      await one.revoke();
      await cut(s);
    },
    'does not show an agent that is suspended': async () => {
      const one = await caller();
      await connect(one);
      await control('suspend', { kind: 'agent', value: agent });
      await assert.rejects(connect(one));
      await control('resume', { kind: 'agent', value: agent });
      await connect(one);
    },
  };
  // Whose a task is, only the agent's own guard knows.
  return proxied ? all : { ...all,
    'keeps the tasks of one from another': async () => {
      const [mine, theirs] = [await connect(await caller()), await connect(await caller())];
      const { id } = await mine.sendMessage(say('echo'));
      await assert.rejects(theirs.getTask({ tenant: '', id, historyLength: 0 }), err => /not ?found/i.test(`${err.name} ${err.message}`));
      assert.equal((await mine.getTask({ tenant: '', id, historyLength: 0 })).id, id);
    },
  };
}
