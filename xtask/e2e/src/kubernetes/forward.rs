//! A pod's port as a port of this machine, through the API server, as `kubectl port-forward` does it.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Ends when it is dropped.
pub(crate) struct Forward {
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Forward {
    pub(super) fn start(runtime: &Runtime, pods: Api<Pod>, pod: String, port: u16) -> Result<Self> {
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).context("take a port")?;
        let address = listener.local_addr()?;
        let task = runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (pods, pod) = (pods.clone(), pod.clone());
                // Each connection for itself; one that breaks is the client's to notice.
                tokio::spawn(async move { carry(&pods, &pod, port, stream).await });
            }
        });
        Ok(Self { address, task })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(pods: &Api<Pod>, pod: &str, port: u16, mut near: TcpStream) -> Result<()> {
    let mut forwarder = pods.portforward(pod, &[port]).await?;
    let mut far = forwarder.take_stream(port).context("the stream that was asked for")?;
    copy_bidirectional(&mut near, &mut far).await?;
    drop(far);
    Ok(forwarder.join().await?)
}
