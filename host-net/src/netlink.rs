//! Conversations with the kernel over netlink.

use std::io;

use futures::TryStreamExt as _;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::{Handle, new_connection};
use tokio::task::JoinHandle;

use crate::Netns;

/// Every namespace begins with its loopback.
pub const LOOPBACK_INDEX: u32 = 1;

/// A connection to the kernel; it speaks of the namespace that it was opened in, whoever uses it.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    driver: JoinHandle<()>,
}

impl Netlink {
    /// Opens a connection in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = new_connection()?;
        Ok(Self { handle, driver: tokio::spawn(connection) })
    }

    /// Opens a connection in `netns`.
    pub async fn open_in(netns: &Netns) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        netns
            .run(move || {
                let _inside = runtime.enter();
                Self::open()
            })
            .await
    }

    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// The index of a link; `None` if there is none of that name.
pub async fn link_index(handle: &Handle, name: &str) -> Option<u32> {
    Some(link(handle, name).await?.header.index)
}

/// The hardware address of a link that is there and has one.
pub async fn link_address(handle: &Handle, name: &str) -> Option<Vec<u8>> {
    let address = |attribute| match attribute {
        LinkAttribute::Address(address) => Some(address),
        _ => None,
    };
    link(handle, name).await?.attributes.into_iter().find_map(address)
}

async fn link(handle: &Handle, name: &str) -> Option<LinkMessage> {
    handle.link().get().match_name(name.to_owned()).execute().try_next().await.ok()?
}

/// For what is to be there, whoever made it.
pub fn add_existing_is_fine(added: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match added {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -nix::libc::EEXIST => Ok(()),
        other => other,
    }
}
