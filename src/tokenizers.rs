//! Text to token ids on threads of their own, between the shards and the batcher.
//!
//! Always true
//! - A text was bounded in bytes by its contract before it came here, and the mailbox is bounded; so is the work.
//! - Each text ends as a request for the batcher or as a refusal to its shard.

use std::sync::Arc;
use std::time::Duration;

use crate::mail::{Burst, Request, ToBatcher, ToShard};
use crate::mailbox::{Received, Receiver, SendError, Sender};
use crate::tokenize::TextTokenizer;
use crate::vocab::{Code, Refusal};

/// What a tokenizer thread needs. The mailbox is shared by all of them.
pub struct Tokenizing {
    /// By model handle.
    pub tokenizers: Vec<Option<Arc<TextTokenizer>>>,
    pub texts: Arc<Receiver<Request>>,
    pub batcher: Sender<ToBatcher>,
    pub shards: Vec<Sender<ToShard>>,
}

impl Tokenizing {
    /// Tokenizes until all shards are gone.
    pub fn run(&self) {
        while let Received::Message(text) = self.texts.recv_until(None, Duration::ZERO) {
            let key = text.key;
            let refusal = match self.tokenize(text) {
                Err(refusal) => refusal,
                Ok(request) => {
                    let burst = Burst { arrivals: vec![request], cancelled: Vec::new() };
                    match self.batcher.send(ToBatcher::Burst(burst)) {
                        Ok(()) => continue,
                        Err(SendError::Full(_) | SendError::Closed(_)) => {
                            Refusal::overloaded("the batcher's mailbox is full", Duration::from_millis(5))
                        }
                    }
                }
            };
            let _ = self.shards[usize::from(key.shard)].send_or_wait(ToShard::Ended(vec![(key, refusal)]));
        }
    }

    fn tokenize(&self, mut request: Request) -> Result<Request, Refusal> {
        let tokenizer = self.tokenizers[request.model.index()]
            .as_ref()
            .ok_or_else(|| Refusal::new(Code::Internal, "this model has no tokenizer"))?;
        let may_truncate = request.truncated;
        let text = std::str::from_utf8(&request.payload[4..4 + request.len as usize])
            .map_err(|_| Refusal::new(Code::Internal, "text that was checked is not UTF-8"))?;
        let tokens = tokenizer.encode(text)?;
        if let Some(whole) = tokens.truncated_from
            && !may_truncate
        {
            let max = tokenizer.limits().len_max;
            return Err(Refusal::too_large(format!("expected a text of at most {max} tokens, got {whole}")));
        }
        request.len = tokens.ids.len() as u32;
        request.truncated = tokens.truncated_from.is_some();
        request.payload = tokens.ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>().into();
        Ok(request)
    }
}
