"""An HTTP server for one model, with the APIs of OpenAI and Anthropic.

``worker.py`` has the model and generates; ``engine.py`` makes a request to it and hands its answer on;
``openai.py`` and ``anthropic.py`` translate; ``schemas.py`` says what requests look like; ``app.py`` puts it
together.
"""
