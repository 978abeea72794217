//! Single containers in networks of the swarm: asks the managers for their places, says so again in
//! every session, and gives them back.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use skep_api::grpc::{AttachmentReply, AttachmentWishes};
use skep_api::{AttachmentGrant, AttachmentId, AttachmentWish, NetworkId, encoding};
use tokio::sync::{Notify, oneshot};

/// How long a container's start waits for the managers' answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

type Answer = Result<AttachmentGrant, String>;

/// What this node wants, and which of it was not said yet in this session.
#[derive(Clone, Debug, Default)]
pub struct Attachments(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    held: Mutex<Held>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Held {
    wishes: BTreeMap<AttachmentId, AttachmentWish>,
    waiting: BTreeMap<AttachmentId, oneshot::Sender<Answer>>,
    unsent: BTreeSet<AttachmentId>,
    released: BTreeSet<AttachmentId>,
    /// Whether the managers are still to be told everything.
    anew: bool,
}

impl Attachments {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().expect("nobody panics while holding it")
    }

    /// Asks for a place and waits for the answer; a place that is refused is not asked for again.
    pub(crate) async fn ask(&self, wish: AttachmentWish) -> io::Result<AttachmentGrant> {
        let (id, network) = (wish.id, wish.network.clone());
        let (sender, answer) = oneshot::channel();
        self.lock().waiting.insert(id, sender);
        // Whatever becomes of the start: what nobody waits for is not kept.
        let unless_granted = ReleaseOnDrop { attachments: self, id };
        self.want(wish);
        let answered = tokio::time::timeout(ANSWER_LIMIT, answer).await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "could not attach to network {network}: no manager of the swarm answered within {} s; \
                     is there a leader?",
                    ANSWER_LIMIT.as_secs()
                ),
            )
        })?;
        let answer = answered.map_err(|_| io::Error::other("this node leaves its swarm"))?;
        let grant = answer.map_err(|why| io::Error::other(format!("could not attach to network {network}: {why}")))?;
        std::mem::forget(unless_granted);
        Ok(grant)
    }

    /// Wants a place, or goes on wanting it; under another name, if its names are others.
    pub(crate) fn want(&self, wish: AttachmentWish) {
        let mut held = self.lock();
        if held.wishes.get(&wish.id) != Some(&wish) {
            held.unsent.insert(wish.id);
            held.wishes.insert(wish.id, wish);
            drop(held);
            self.0.news.notify_one();
        }
    }

    /// Gives back what a container has: in one network, or all.
    pub(crate) fn release(&self, container: &str, network: Option<NetworkId>) {
        let network = network.map(|id| id.to_string());
        let over: Vec<AttachmentId> = {
            let held = self.lock();
            let of = |wish: &&AttachmentWish| {
                wish.container == container && network.as_ref().is_none_or(|network| wish.network == *network)
            };
            held.wishes.values().filter(of).map(|wish| wish.id).collect()
        };
        over.into_iter().for_each(|id| self.give_back(id));
    }

    fn give_back(&self, id: AttachmentId) {
        let mut held = self.lock();
        held.waiting.remove(&id);
        held.unsent.remove(&id);
        if held.wishes.remove(&id).is_some() {
            held.released.insert(id);
        }
        drop(held);
        self.0.news.notify_one();
    }

    /// A new session: its manager may know nothing of what was said before.
    pub(crate) fn begin_session(&self) {
        let mut held = self.lock();
        held.unsent = held.wishes.keys().copied().collect();
        held.released.clear();
        held.anew = true;
        drop(held);
        self.0.news.notify_one();
    }

    /// Waits until there is something to say.
    pub(crate) async fn next_message(&self) -> AttachmentWishes {
        loop {
            {
                let mut held = self.lock();
                let complete = std::mem::take(&mut held.anew);
                let unsent = std::mem::take(&mut held.unsent);
                let released = std::mem::take(&mut held.released);
                if complete || !unsent.is_empty() || !released.is_empty() {
                    let wishes = unsent.iter().filter_map(|id| held.wishes.get(id)).map(encoding::encode).collect();
                    let released = released.iter().map(|id| id.to_bytes().to_vec()).collect();
                    return AttachmentWishes { complete, wishes, released };
                }
            }
            self.0.news.notified().await;
        }
    }

    /// Takes a manager's answer.
    pub(crate) fn take(&self, reply: &AttachmentReply) -> Result<(), encoding::DecodeError> {
        let Some(id) = AttachmentId::from_bytes(&reply.id) else { return Ok(()) };
        let answer: Answer =
            if reply.grant.is_empty() { Err(reply.refusal.clone()) } else { Ok(encoding::decode(&reply.grant)?) };
        let mut held = self.lock();
        if let (Ok(grant), Some(wish)) = (&answer, held.wishes.get_mut(&id)) {
            // From now on it is this one that is wanted.
            wish.network = grant.network.to_string();
            wish.address = Some(grant.address);
        }
        match (held.waiting.remove(&id), &answer) {
            // Whoever waits no longer gave it back.
            (Some(waiting), _) => drop(waiting.send(answer)),
            (None, Err(why)) => {
                tracing::error!(attachment = %id, why, "a running container's place in a network is refused: restart it");
            }
            (None, Ok(_)) => {}
        }
        Ok(())
    }
}

struct ReleaseOnDrop<'a> {
    attachments: &'a Attachments,
    id: AttachmentId,
}

impl Drop for ReleaseOnDrop<'_> {
    fn drop(&mut self) {
        self.attachments.give_back(self.id);
    }
}
