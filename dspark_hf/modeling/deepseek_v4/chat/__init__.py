"""The prompt format of DeepSeek-V4: encoder, chat template and parser. No model is needed, nor a GPU."""

from dspark_hf.modeling.deepseek_v4.chat.constants import DEFAULT_RELEASE, REASONING_EFFORTS
from dspark_hf.modeling.deepseek_v4.chat.encoding import encode_messages
from dspark_hf.modeling.deepseek_v4.chat.parsing import parse_response
from dspark_hf.modeling.deepseek_v4.chat.reading import ResponseDelta, ResponseReader
from dspark_hf.modeling.deepseek_v4.chat.responses import Response, ToolCall
from dspark_hf.modeling.deepseek_v4.chat.template import chat_template, set_chat_template

__all__ = [
    "DEFAULT_RELEASE",
    "REASONING_EFFORTS",
    "Response",
    "ResponseDelta",
    "ResponseReader",
    "ToolCall",
    "chat_template",
    "encode_messages",
    "parse_response",
    "set_chat_template",
]
