"""An HTTP server for one model, with the APIs of OpenAI, Anthropic and Ollama.

``worker.py`` has the model and generates; ``engine.py`` makes a request to it and hands its answer on;
``openai.py``, ``responses.py``, ``anthropic.py`` and ``ollama.py`` translate; ``schemas.py`` says what requests look
like; ``app.py`` puts it together.
"""
