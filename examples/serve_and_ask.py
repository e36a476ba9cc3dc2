"""Asks a running server the same question at several budgets, with the OpenAI client.

python -m sglang.launch_server --model-path Qwen/Qwen2.5-VL-3B-Instruct --mmtok-budget 10% --port 30000
python examples/serve_and_ask.py --image photo.jpg --question "What is on the table?"
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default %(default)s)")
parser.add_argument("--image", type=Path, required=True, help="a JPEG or PNG file")
parser.add_argument("--question", default="What is in the image?")
parser.add_argument(
    "--budgets", nargs="+", default=["all", "25%", "10%"], help="of each request (default all 25%% 10%%)"
)
arguments = parser.parse_args()

data = base64.b64encode(arguments.image.read_bytes()).decode()
content = [
    {"type": "image_url", "image_url": {"url": f"data:image;base64,{data}"}},
    {"type": "text", "text": arguments.question},
]
client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
for budget in arguments.budgets:
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": content}],
        max_tokens=64,
        temperature=0,
        # The server's own budget counts where a request names none.
        extra_body={"mm_processor_kwargs": {"mmtok_budget": budget}},
    )
    print(f"{budget:>5}: {answer.usage.prompt_tokens:>5} prompt tokens: {answer.choices[0].message.content!r}")
