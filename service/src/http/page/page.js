// The chat page: what it knows, and how it shows it. Text from the service becomes text nodes only.

import { ApiError, ChatClient, newKey } from './chat-client.js';

const chat = new ChatClient(new URL('.', document.baseURI).href);
const part = (id) => document.getElementById(id);

// For this tab alone, and gone with it: a token in localStorage would outlive the browser, on machines that are shared.
const TOKEN = 'chat-token';

/** The user who has logged in; null at the entrance. */
let me = null;
/** Ends the stream. */
let leaving = null;
/** Conversations by the peer's id: `{peer, last, lastSeq}`. */
let conversations = new Map();
let nextConversations = null;
/** The open conversation: `{peer, messages by seq, unsent, hasEarlier}`; null without one. */
let open = null;

// ---- What was seen

// The seq up to which each conversation was seen, for the counts of what is new. This browser's own.
const seenKey = () => `chat-seen-${me.id}`;
let seen = {};

function loadSeen() {
  try {
    seen = JSON.parse(localStorage.getItem(seenKey())) ?? {};
  } catch {
    seen = {};
  }
}

function markSeen(peerId, seq) {
  if ((seen[peerId] ?? 0) >= seq) return;
  seen[peerId] = seq;
  try {
    localStorage.setItem(seenKey(), JSON.stringify(seen));
  } catch {
    // Without storage the counts last as long as the page.
  }
}

// ---- The entrance

const purpose = () => new FormData(part('entrance-form')).get('purpose');

function showEntrance(notice) {
  leaving?.abort();
  leaving = null;
  me = null;
  open = null;
  conversations = new Map();
  chat.token = null;
  sessionStorage.removeItem(TOKEN);
  part('chat').hidden = true;
  part('entrance').hidden = false;
  part('messages').replaceChildren();
  part('conversations').replaceChildren();
  part('password').value = '';
  part('content').value = '';
  show('entrance-notice', notice);
  part(part('username').value ? 'password' : 'username').focus();
}

function show(id, notice) {
  part(id).textContent = notice ?? '';
  part(id).hidden = !notice;
}

function showFaults(error) {
  for (const field of ['username', 'email', 'password']) {
    const fault = error?.errors?.find((one) => one.field === field);
    part(`${field}-fault`).textContent = fault?.message ?? '';
    part(field).setAttribute('aria-invalid', String(fault !== undefined));
  }
  show('entrance-notice', error && !error.errors?.length ? words(error) : null);
  document.querySelector('#entrance [aria-invalid=true]')?.focus();
}

part('entrance-form').addEventListener('change', () => {
  const registers = purpose() === 'register';
  part('email-part').hidden = !registers;
  part('enter').textContent = registers ? 'Register' : 'Log in';
  part('password').autocomplete = registers ? 'new-password' : 'current-password';
});

part('entrance-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  const [username, email, password] = ['username', 'email', 'password'].map((id) => part(id).value);
  part('enter').disabled = true;
  try {
    showFaults(null);
    if (purpose() === 'register') await chat.register(username, email, password);
    await chat.login(username, password);
    sessionStorage.setItem(TOKEN, chat.token);
    await enter();
  } catch (error) {
    showFaults(error);
  } finally {
    part('enter').disabled = false;
  }
});

part('log-out').addEventListener('click', () => showEntrance());

/** What a person can do about it. */
function words(error) {
  if (!(error instanceof ApiError)) return 'The service cannot be reached. Try again.';
  const fields = error.errors.map((fault) => `${fault.field} ${fault.message}`).join('; ');
  return fields || error.message;
}

/** Shows an error where it belongs; where the token is not accepted any more, the entrance. */
function fail(error, id) {
  if (error instanceof ApiError && error.status === 401) {
    showEntrance('Your session has ended. Log in again.');
  } else {
    show(id, words(error));
  }
}

// ---- The stream

async function enter() {
  me = await chat.me();
  loadSeen();
  const position = await loadConversations();
  part('me').textContent = me.username;
  part('entrance').hidden = true;
  part('chat').hidden = false;
  showConversation(null);
  part('find').focus();
  leaving = new AbortController();
  follow(position, leaving.signal);
}

async function follow(position, signal) {
  try {
    await chat.follow({ position, signal, onMessage: arrived, onReset: reload, onState: showState });
  } catch (error) {
    if (!signal.aborted) fail(error, 'conversation-notice');
  }
}

function showState(state, wait) {
  const seconds = Math.ceil(wait / 1000);
  const text = { open: 'Connected', connecting: 'Connecting…', waiting: `Not connected. Trying again in ${seconds} s` };
  // A stream ends now and then, and is back within a moment: that is no news.
  part('connection').dataset.state = state;
  part('connection').textContent = text[state];
}

async function arrived(message) {
  const peerId = message.sender_id === me.id ? message.recipient_id : message.sender_id;
  const conversation = conversations.get(peerId);
  if (!conversation) {
    // The stream has ids, and the list has names.
    await loadConversations();
  } else if (message.seq > conversation.lastSeq) {
    Object.assign(conversation, { last: message, lastSeq: message.seq });
  }
  if (open?.peer.id === peerId) {
    addMessage(message);
    showMessages();
  }
  showConversations();
}

/** After a gap that the stream cannot fill. */
async function reload() {
  await loadConversations();
  if (open) await loadNewer(open);
}

async function loadNewer(conversation) {
  let more = true;
  while (more && open === conversation) {
    const after = Math.max(0, ...conversation.messages.keys());
    const page = await chat.messages(conversation.peer.id, { after });
    page.messages.forEach(addMessage);
    more = page.more;
  }
  showMessages();
}

// ---- Conversations

async function loadConversations(page) {
  const answer = await chat.conversations(page);
  for (const { peer, last_message: last, last_seq: lastSeq } of answer.conversations) {
    if (lastSeq >= (conversations.get(peer.id)?.lastSeq ?? 0)) conversations.set(peer.id, { peer, last, lastSeq });
  }
  if (page || nextConversations === null) nextConversations = answer.next;
  showConversations();
  return answer.position;
}

function showConversations() {
  if (open) markSeen(open.peer.id, conversations.get(open.peer.id)?.lastSeq ?? 0);
  const list = [...conversations.values()].sort((a, b) => (a.last.created_at < b.last.created_at ? 1 : -1));
  const focused = document.activeElement?.dataset?.peer;
  const items = list.map((one) => {
    const state = JSON.stringify([one.peer.username, one.last.id, countNew(one), open?.peer.id === one.peer.id]);
    return { key: one.peer.id, state, make: () => conversationItem(one) };
  });
  place(part('conversations'), items);
  if (focused) document.querySelector(`[data-peer="${CSS.escape(focused)}"]`)?.focus();
  part('more-conversations').hidden = nextConversations === null;
  const news = list.reduce((sum, one) => sum + countNew(one), 0);
  document.title = news > 0 ? `(${news}) Chat` : 'Chat';
}

const countNew = ({ peer, lastSeq }) => Math.max(0, lastSeq - (seen[peer.id] ?? 0));

function conversationItem(conversation) {
  const { peer, last } = conversation;
  const button = element('button', { type: 'button', className: 'conversation' });
  button.dataset.peer = peer.id;
  button.setAttribute('aria-current', String(open?.peer.id === peer.id));
  button.append(
    element('span', { className: 'name', dir: 'auto', textContent: nameOf(peer) }),
    element('span', { className: 'last', dir: 'auto', textContent: last.content.slice(0, 100) }),
  );
  const news = countNew(conversation);
  if (news > 0) {
    const count = element('span', { className: 'new', textContent: news > 99 ? '99+' : String(news) });
    count.append(element('span', { className: 'for-readers', textContent: ' new' }));
    button.append(count);
  }
  button.addEventListener('click', () => openConversation(peer));
  const item = element('li', {});
  item.append(button);
  return item;
}

const nameOf = (peer) => peer.username ?? 'Deleted user';

part('more-conversations').addEventListener('click', () => {
  loadConversations(nextConversations).catch((error) => fail(error, 'conversation-notice'));
});

part('find-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  const name = part('find').value.trim();
  part('find-fault').textContent = '';
  if (!name) return;
  try {
    const peer = await chat.findUser(name);
    part('find').value = '';
    if (peer.id === me.id) part('find-fault').textContent = 'That is you.';
    else await openConversation(peer);
  } catch (error) {
    if (error.status === 404) part('find-fault').textContent = `There is no user ${name}.`;
    else fail(error, 'conversation-notice');
  }
});

// ---- A conversation

async function openConversation(peer) {
  showConversation({ peer, messages: new Map(), unsent: [], hasEarlier: false });
  const conversation = open;
  try {
    const page = await chat.messages(peer.id);
    if (open !== conversation) return;
    page.messages.forEach(addMessage);
    conversation.hasEarlier = page.more;
    showMessages();
    showConversations();
  } catch (error) {
    if (open === conversation) fail(error, 'conversation-notice');
  }
}

function showConversation(conversation) {
  open = conversation;
  part('chat').dataset.shows = conversation ? 'conversation' : 'list';
  part('peer').textContent = conversation ? nameOf(conversation.peer) : 'No conversation is open';
  part('write-form').hidden = !conversation;
  show('conversation-notice', null);
  showMessages();
  showConversations();
  if (conversation) part('content').focus();
}

part('back').addEventListener('click', () => {
  const peerId = open?.peer.id;
  showConversation(null);
  document.querySelector(`[data-peer="${CSS.escape(peerId ?? '')}"]`)?.focus();
});

part('conversation').addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && open) part('back').click();
});

function addMessage(message) {
  open.messages.set(message.seq, message);
}

function showMessages() {
  const history = part('history');
  const atEnd = history.scrollHeight - history.scrollTop - history.clientHeight < 40;
  const stored = [...(open?.messages.values() ?? [])].sort((a, b) => a.seq - b.seq);
  const items = stored.map((message) => ({ key: message.id, state: '', make: () => messageItem(message) }));
  const unsent = (open?.unsent ?? []).map((message) => {
    return { key: message.key, state: String(message.fault), make: () => unsentItem(message) };
  });
  place(part('messages'), [...items, ...unsent]);
  part('earlier').hidden = !open?.hasEarlier;
  if (atEnd) history.scrollTop = history.scrollHeight;
}

function messageItem(message) {
  const time = new Date(message.created_at);
  const isToday = time.toDateString() === new Date().toDateString();
  const style = isToday ? { timeStyle: 'short' } : { dateStyle: 'medium', timeStyle: 'short' };
  const textContent = time.toLocaleString([], style);
  const about = element('time', { className: 'about', dateTime: message.created_at, textContent });
  return bubble(message.sender_id === me.id, message.content, about);
}

function unsentItem(message) {
  const about = element('span', { className: 'about' });
  about.textContent = 'Sending…';
  if (message.fault) {
    about.classList.add('unsent');
    about.textContent = `Not sent: ${message.fault}`;
    const again = element('button', { type: 'button', textContent: 'Send again' });
    again.addEventListener('click', () => send(open, message));
    about.append(again);
  }
  return bubble(true, message.content, about);
}

function bubble(isMine, content, about) {
  const item = element('li', { className: isMine ? 'mine' : '' });
  item.append(
    element('span', { className: 'for-readers', textContent: isMine ? 'You: ' : `${nameOf(open.peer)}: ` }),
    element('div', { className: 'text', dir: 'auto', textContent: content }),
    about,
  );
  return item;
}

part('earlier').addEventListener('click', async () => {
  const conversation = open;
  const history = part('history');
  const fromEnd = history.scrollHeight - history.scrollTop;
  try {
    const page = await chat.messages(conversation.peer.id, { before: Math.min(...conversation.messages.keys()) });
    if (open !== conversation) return;
    page.messages.forEach(addMessage);
    conversation.hasEarlier = page.more;
    showMessages();
    history.scrollTop = history.scrollHeight - fromEnd;
  } catch (error) {
    if (open === conversation) fail(error, 'conversation-notice');
  }
});

// ---- Sending

part('content').addEventListener('keydown', (event) => {
  // Enter also ends the composition of a character.
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    part('write-form').requestSubmit();
  }
});

part('write-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const content = part('content').value;
  if (!open || content.trim() === '') return;
  part('content').value = '';
  send(open, { key: newKey(), content });
});

/** Sends it for the first time or again, always under its own key, so that it is stored once. */
async function send(conversation, unsent) {
  unsent.fault = null;
  if (!conversation.unsent.includes(unsent)) conversation.unsent.push(unsent);
  showMessages();
  part('history').scrollTop = part('history').scrollHeight;
  try {
    const message = await chat.send(conversation.peer.id, unsent.content, unsent.key);
    conversation.unsent = conversation.unsent.filter((one) => one !== unsent);
    if (open === conversation) addMessage(message);
    await arrived(message);
  } catch (error) {
    unsent.fault = words(error);
    if (error.status === 401) fail(error, 'conversation-notice');
  }
  if (open === conversation) showMessages();
}

/**
 * Makes these the items of a list. Those that are there and have not changed stay where they are: they keep the focus, and
 * a screen reader reads the others alone.
 */
function place(list, wanted) {
  const there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  wanted.forEach(({ key, state, make }, index) => {
    let item = there.get(key);
    if (item?.dataset.state !== state) {
      item?.remove();
      item = make();
      Object.assign(item.dataset, { key, state });
    }
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  while (list.children.length > wanted.length) list.lastElementChild.remove();
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

/** Goes on with the session from before the page was loaded again. */
async function resume() {
  try {
    await enter();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return showEntrance('Your session has ended. Log in again.');
    part('entrance').hidden = false;
    show('entrance-notice', words(error));
    setTimeout(() => chat.token && !leaving && resume(), 3000);
  }
}

chat.token = sessionStorage.getItem(TOKEN);
if (chat.token) resume();
else showEntrance();
